"""The recipe: one frozen, typed tree. A key is here only if something acts on it.

Every field carries a docstring with its unit and the reason for its default; `ftlaunch schema` and the reference
page are made from them. Rules that span sections live in `checks.py`, reading files in `load.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .schema_cluster import ClusterConfig, LocalCluster
from .schema_strategy import Fsdp, StrategyConfig
from .section import Fraction, NonNegativeInt, PositiveInt, Section

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class Model(Section):
    """Which model is trained, and in which precision."""

    path: str
    """Hub id, folder, or any fsspec URL that holds config.json and safetensors weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: the hub's default branch."""
    allow_pickle: bool = False
    """Read weights that are there as pickle only (`pytorch_model.bin`), from a local disk or a hub. Nothing but tensors
    is taken from them, and nothing in them is run; import-checkpoint turns them into safetensors once and for all."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws every weight from (train.seed, tensor name) and needs only config.json and a tokenizer."""
    keep_optimizer_state: bool = False
    """Start with the optimizer's state and the fp32 weights that lie beside the weights (in `training/`: of one of our
    checkpoints, or of one from import-checkpoint --training) rather than with a new optimizer. Steps, schedule and data
    begin anew all the same. Not with an adapter."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype and the dtype of the published weights. Trainable master weights are fp32 either way."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernels. `auto`: sdpa, which ships with torch and runs everywhere; on CUDA, for packed samples, torch's
    variable-length attention where that gives this model what sdpa gives it. `flash_attention_2` needs flash-attn."""
    tokenizer: str | None = None
    """Folder, URL or hub id of the tokenizer; None: the one beside the model."""
    chat_template: str | None = None
    """A Jinja template, or the path of a .jinja file; None: the tokenizer's own."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Variables of the chat template, as {enable_thinking: false}; one that the template does not use is an error."""
    train_layers: tuple[str, ...] = ()
    """Shell-style patterns of parameter names to train (`model.layers.3?.*`); empty: all. Not with an adapter."""


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), through peft."""

    type: Literal["lora", "qlora"] = "lora"
    """`qlora`: the base's linear layers are held in 4 bits (NF4, Dettmers et al. 2023, arXiv:2305.14314), all but the
    head, through bitsandbytes: a third of the memory of bfloat16, for slower steps."""
    rank: PositiveInt = 16
    """Rank of the update; 16 is the usual start."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank; 2 x rank is the usual start."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732): so that a high rank, 64 and
    more, learns as fast as a low one."""
    use_dora: bool = False
    """Train the length of each weight row apart from its direction (DoRA, Liu et al. 2024, arXiv:2402.09353): often
    better at a low rank, and slower."""
    init: Literal["kaiming", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"] = "kaiming"
    """Where the adapter starts. `kaiming` and `gaussian`: A drawn, B zero. `pissa`: the principal singular vectors of
    the weights (Meng et al. 2024, arXiv:2404.02948), exact, or found by 4 or 16 rounds of subspace iteration, which
    takes a small part of the time. `olora`: an orthonormal basis of them (Büyükakyüz 2024,
    arXiv:2406.01775). What is saved is a plain adapter of twice the rank on the model as it was: trained less start."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`: every linear layer but the head; a list: suffixes of module names; any other text: a regular
    expression that fits a module's whole name."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained in full and saved with the adapter (`lm_head`, `embed_tokens`)."""

    @property
    def starts_within(self) -> bool:
        """Whether the adapter starts as a part of the weights, and not as nothing."""
        return self.init not in ("kaiming", "gaussian")

    @property
    def stored_rank(self) -> int:
        """Rank of the saved adapter: one that starts within the weights keeps its start beside what is trained."""
        return 2 * self.rank if self.starts_within else self.rank


class Sft(Section):
    """Supervised fine-tuning: cross-entropy on the tokens that the model shall learn to write."""

    type: Literal["sft"] = "sft"
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """Which tokens of a chat are supervised: every turn of the assistant, its last one, those after the last question,
    or all tokens. A message's own `weight`, `train` or `training` of 0 leaves it out. A prompt/completion row always
    supervises its completion, or with `all` everything; a text row everything."""


class Cpt(Section):
    """Continued pretraining: cross-entropy on every token of raw text."""

    type: Literal["cpt"] = "cpt"


RowFormat = Literal[
    "chat",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
    "tokenized",
    "preference",
    "binary_preference",
    "ranking",
]
Overlong = Literal["split", "drop", "truncate_left", "truncate_right", "error"]


class Source(Section):
    """One place that rows come from."""

    path: str | tuple[str, ...]
    """File, folder, glob or any fsspec URL, or a list of them: parquet, jsonl, json, csv, tsv, arrow, txt, md; text
    formats also as .gz and .zst. Or a data set of the Hugging Face hub: hub:ORG/NAME, hub:ORG/NAME@REVISION."""
    split: str | None = None
    """Split of a hub data set (train, test …); None: its only one."""
    subset: str | None = None
    """Subset (configuration) of a hub data set; None: its only or default one."""
    format: RowFormat | None = None
    """How a row is read. None: found from the columns when that is unambiguous, and said."""
    columns: dict[str, str] = {}
    """Standard name -> the file's column, for columns with other names: {messages: conversation}."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name in reports; None: made from the path."""
    storage_options: dict[str, Any] = {}
    """What fsspec is told besides the path, per source: {endpoint_url: ..., anon: true, requester_pays: true, profile:
    NAME, client_kwargs: {region_name: ...}}. Never credentials: those come from the environment."""
    skip: NonNegativeInt = 0
    """Rows left out at the beginning: files in the order of their names, rows in file order."""
    take: PositiveInt | None = None
    """Rows used after those; None: all. Where files do not say how many rows they hold (JSON lines), they are read
    once as far as needed when the run first starts."""
    overlong: Overlong | None = None
    """What becomes of rows longer than a sequence; None: as data.overlong says."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return (self.path,) if isinstance(self.path, str) else self.path


class TrainSource(Source):
    """A source of training rows."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of samples drawn from this source, relative to the other weights. Weights go on all sources or none;
    without them every source is served in full each epoch."""
    primary: bool = False
    """With weights, epochs are counted on the primary source; by default the first."""
    repeat: bool = True
    """With weights: a source that ends before the primary one begins again (true), or stays out (false)."""
    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over this source in the run, in part too: 0.5 serves half of it, 2.5 some of its rows three times. None:
    train.num_epochs. With weights: after so many passes the source stays out."""


class EvalSplit(Section):
    """Hold out a part of every training source, by a hash of the row: disjoint, and the same for ever."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of rows held out."""


class Data(Section):
    """Which rows are trained on, and how they are laid into sequences."""

    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    """Where training rows come from."""
    eval: tuple[Source, ...] | EvalSplit = ()
    """Held-out sources, each with its own loss; or {fraction: 0.02}."""
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens per sequence."""
    packing: bool = True
    """Put several samples into one sequence; they never see each other. Off: one sample a sequence."""
    pack_buffer: PositiveInt = 64
    """Samples that wait per stream for a sequence they fit; 64 fills 99.9 % of log-normal lengths."""
    overlong: Overlong | None = None
    """A row longer than a sequence: `split` cuts it into pieces, `truncate_left` keeps its end, `truncate_right` its
    beginning, `drop` leaves it out, `error` stops. None: text is split, anything else dropped. All are counted."""
    shuffle: bool = True
    """Off: rows come in file order (within each stream)."""
    streams: PositiveInt | None = None
    """Logical streams the data is cut into; must divide global_batch_size. None: the largest divisor not above
    max(16, world size) at the run's first start; recorded with the run."""
    disk_cache_gb: Annotated[float, Field(gt=0)] | None = None
    """Local disk (GB, under TMPDIR) that decoded blocks may take on each node, so that neither later epochs nor other
    ranks fetch them again; the least recently used leave first, and all when the run ends. Of parquet, Arrow, JSON
    lines, csv and tsv. None: only blocks of 8 MiB and more that several streams share."""
    reader_processes: NonNegativeInt | None = None
    """Processes per rank that read and tokenise; 0: a thread of the rank's own. None: 0 on a CPU, which
    computes on all its cores; on a GPU one for every 4 cores of the rank, at most 2. The steps are the same for any
    number."""


class Train(Section):
    """The optimisation."""

    num_epochs: PositiveInt | None = None
    """Passes over the training data. None: 1, unless max_steps or max_tokens is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    max_tokens: PositiveInt | None = None
    """Tokens read by the model, prompts included, padding not."""
    global_batch_size: PositiveInt = 32
    """Sequences per optimizer step, whatever the number of GPUs; accumulation is derived."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass of one rank."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate; 2e-5 suits full fine-tuning, adapters want about 1e-4 to 2e-4."""
    lr_scheduler: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after warm-up, over the run's progress; wsd: constant, then linear over the last decay_ratio."""
    warmup_ratio: Fraction = 0.0
    """Share of the run over which the rate rises linearly. Not with warmup_steps."""
    warmup_steps: NonNegativeInt | None = None
    """Steps over which the rate rises linearly. Not with warmup_ratio."""
    decay_ratio: Fraction = 0.2
    """wsd only: share of the run over which the rate falls."""
    min_lr_ratio: Fraction = 0.0
    """Final rate as a share of the peak (linear, cosine, wsd)."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    """`adamw`: 8 bytes of state a parameter. `adamw_8bit`: 2, through bitsandbytes. `adafactor`: next to none, no
    first moment (Shazeer & Stern 2018). `muon`: 4 for hidden matrices, which it makes orthogonal (Jordan et al. 2024);
    AdamW for embeddings, head and vectors, with one learning rate for both."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates; Muon's momentum is 0.95."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms, biases and embeddings of one dimension are excluded."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null: no clipping."""
    seed: NonNegativeInt = 0
    """Seed of the data order, of new tensors and of dropout."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more compute."""
    compile: bool = False
    """torch.compile each block."""
    deterministic: bool = False
    """Deterministic CUDA kernels: runs repeat bit for bit, more slowly. CPU runs always do."""


class EarlyStopping(Section):
    """Stop when an evaluation loss no longer falls."""

    metric: str
    """`NAME/loss` of an eval set."""
    patience: PositiveInt = 3
    """Evaluations without improvement before stopping."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Improvement that counts, in loss units."""


class Evaluate(Section):
    """When held-out loss is measured."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between evaluations; None: only as below."""
    at_start: bool = True
    """Measure the untrained model, for the before/after table."""
    at_end: bool = True
    """Measure the final model."""
    early_stopping: EarlyStopping | None = None
    """Stop when a held-out loss stops falling; the best checkpoint is kept."""


class Checkpoint(Section):
    """Where the run lives and when it is saved."""

    path: str = "./runs"
    """Folder or any fsspec URL; the run's own directory is PATH/NAME."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between saves; None: only at the end, at an interrupt and with a new best."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after a save at which the next one is due, by rank 0's clock; with every_steps, whichever comes first."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides are kept besides; None: none."""
    keep_best: NonNegativeInt | None = None
    """Checkpoints with the lowest held-out losses, kept besides, by evaluate.early_stopping.metric or the only eval
    set's loss. None: 1 with early stopping, else 0."""
    keep_training_state: PositiveInt = 1
    """Newest checkpoints that keep what resuming needs (masters and moments, several times the weights' bytes); older
    ones keep their weights only."""
    mode: Literal["auto", "async", "sync"] = "auto"
    """`async`: training waits for a copy to host memory, and goes on while that is written; `sync`: it waits for the
    whole save, which needs no memory. `auto`: async where the copies take at most half of each host's free memory."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a save fails: `stop` the run, or `continue` with a warning (not at the end of the run)."""


class Wandb(Section):
    """Weights & Biases; needs the extra `ftlaunch[wandb]`."""

    project: str
    """Project the run is filed under."""
    entity: str | None = None
    """User or team; None: the account's default."""


class Track(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: Wandb | None = None
    """Send metrics to Weights & Biases."""


MethodConfig = Annotated[Sft | Cpt, Field(discriminator="type")]
AdapterConfig = Lora


class Recipe(Section):
    """One fine-tuning run, whole."""

    name: RunName
    """The run's name: its directory under checkpoint.path. Default: the recipe file's name."""
    model: Model
    """Which model."""
    adapter: AdapterConfig | None = None
    """Train an adapter; left out: full fine-tuning."""
    method: MethodConfig = Sft()
    """How it learns."""
    data: Data
    """From what it learns."""
    train: Train = Train()
    """The optimisation."""
    evaluate: Evaluate = Evaluate()
    """When held-out loss is measured."""
    strategy: StrategyConfig = Fsdp()
    """How the model is laid out over ranks."""
    checkpoint: Checkpoint = Checkpoint()
    """Where the run lives."""
    track: Track = Track()
    """Where metrics go."""
    cluster: ClusterConfig = LocalCluster()
    """Where it runs; in a file also the NAME of a profile (clusters/NAME.yaml)."""
