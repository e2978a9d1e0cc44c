"""`strategy.deepspeed_config`: which of DeepSpeed's own keys pass, and which contradict the recipe.

A recipe says the same for every strategy, and so do DeepSpeed's keys that mean the same thing only where both agree
("auto", as in files for Hugging Face's Trainer, always does). What passes besides tunes ZeRO without changing what is
computed. DeepSpeed does not look at names it does not know, so any other key is a mistake here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from .problems import Problem
from .schema import Recipe
from .schema_strategy import Deepspeed

AUTO = "auto"
PLACE = "strategy.deepspeed_config"


class Said(NamedTuple):
    """What the recipe says already: under which key, and as which value of DeepSpeed's."""

    recipe_key: str
    value: Callable[[Recipe, Deepspeed], Any]


SAID: Mapping[str, Said] = {
    "train_batch_size": Said("train.global_batch_size", lambda recipe, _: recipe.train.global_batch_size),
    "train_micro_batch_size_per_gpu": Said("train.micro_batch_size", lambda recipe, _: recipe.train.micro_batch_size),
    "gradient_clipping": Said("train.max_grad_norm", lambda recipe, _: recipe.train.max_grad_norm or 0.0),
    "optimizer.type": Said("train.optimizer", lambda *_: "AdamW"),
    "optimizer.params.lr": Said("train.learning_rate", lambda recipe, _: recipe.train.learning_rate),
    "optimizer.params.betas": Said("train.betas", lambda recipe, _: list(recipe.train.betas)),
    "optimizer.params.eps": Said("train.eps", lambda recipe, _: recipe.train.eps),
    "optimizer.params.weight_decay": Said("train.weight_decay", lambda recipe, _: recipe.train.weight_decay),
    "bf16.enabled": Said("model.dtype", lambda recipe, _: recipe.model.dtype == "bfloat16"),
    "fp16.enabled": Said("model.dtype", lambda *_: False),
    "zero_optimization.stage": Said("strategy.stage", lambda _, strategy: strategy.stage),
    "zero_optimization.offload_optimizer.device": Said(
        "strategy.offload_optimizer", lambda _, strategy: strategy.offload_optimizer
    ),
    "zero_optimization.offload_param.device": Said(
        "strategy.offload_param", lambda _, strategy: strategy.offload_param
    ),
}

DERIVED = "it follows from train.global_batch_size, train.micro_batch_size and the number of ranks"
SCHEDULE = "train.lr_scheduler and warmup_ratio say it"
SUMS = "gradients are sums that are divided by one weight of the whole step"
FP32 = "gradients are added up and sent in fp32"
SAME_NUMBERS = "it would change what is computed, which is the same under every strategy"
NVME = "keeping state on NVMe is not supported; the host's memory is: cpu"

REFUSED: Mapping[str, str] = {
    "gradient_accumulation_steps": DERIVED,
    "scheduler": SCHEDULE,
    "prescale_gradients": SUMS,
    "gradient_predivide_factor": SUMS,
    "gradient_allreduce_op": SUMS,
    "managed_gradient_accumulation": DERIVED,
    "data_types": FP32,
    "communication_data_type": FP32,
    "fp16": "model.dtype is bfloat16 or float32",
    "bf16": "master weights, moments and gradients are fp32",
    "amp": "model.dtype says it",
    "torch_autocast": "model.dtype says it",
    "optimizer": "train.optimizer and its neighbours say it",
    "activation_checkpointing": "train.activation_checkpointing says it",
    "compile": "train.compile says it",
    "checkpoint": "checkpoints are those of every strategy",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "checkpoints are whole without it",
    "zero_optimization.zero_quantized_weights": SAME_NUMBERS,
    "zero_optimization.zero_quantized_nontrainable_weights": SAME_NUMBERS,
    "zero_optimization.zero_quantized_gradients": SAME_NUMBERS,
    "zero_optimization.zenflow": SAME_NUMBERS,
    "zero_optimization.offload_optimizer.nvme_path": NVME,
    "zero_optimization.offload_param.nvme_path": NVME,
}

FLAG, COUNT = "true or false", "a whole number"

PASSES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "zero_optimization.overlap_comm": (FLAG, (1, 2, 3)),
    "zero_optimization.contiguous_gradients": (FLAG, (1, 2, 3)),
    "zero_optimization.reduce_scatter": (FLAG, (1, 2, 3)),
    "zero_optimization.reduce_bucket_size": (COUNT, (1, 2, 3)),
    "zero_optimization.allgather_bucket_size": (COUNT, (1, 2)),
    "zero_optimization.round_robin_gradients": (FLAG, (1, 2)),
    "zero_optimization.use_multi_rank_bucket_allreduce": (FLAG, (1, 2)),
    "zero_optimization.sub_group_size": (COUNT, (3,)),
    "zero_optimization.stage3_prefetch_bucket_size": (COUNT, (3,)),
    "zero_optimization.stage3_param_persistence_threshold": (COUNT, (3,)),
    "zero_optimization.stage3_model_persistence_threshold": (COUNT, (3,)),
    "zero_optimization.stage3_max_live_parameters": (COUNT, (3,)),
    "zero_optimization.stage3_max_reuse_distance": (COUNT, (3,)),
    "zero_optimization.stage3_module_granularity_threshold": (COUNT, (3,)),
    "zero_optimization.memory_efficient_linear": (FLAG, (3,)),
    "zero_optimization.offload_optimizer.pin_memory": (FLAG, (1, 2, 3)),
    "zero_optimization.offload_param.pin_memory": (FLAG, (3,)),
}
"""What may be set: its kind, and the stages where DeepSpeed looks at it."""


def conflicts(recipe: Recipe) -> Iterator[Problem]:
    """Keys of `deepspeed_config` that contradict the recipe, or that nothing would act on."""
    if isinstance(recipe.strategy, Deepspeed):
        for path, value in leaves(recipe.strategy.deepspeed_config):
            yield from _problems(recipe, recipe.strategy, path, value)


def leaves(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is no section itself."""
    for key, value in config.items():
        path = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path, value


def _problems(recipe: Recipe, strategy: Deepspeed, path: str, value: Any) -> Iterator[Problem]:
    key = f"{PLACE}.{path}"
    if path in SAID:
        said = SAID[path].value(recipe, strategy)
        if value == "nvme":
            yield Problem(key, NVME, f"set {SAID[path].recipe_key}: cpu")
        elif value not in (said, AUTO):
            message = f"{_shown(value)} contradicts {SAID[path].recipe_key}, which makes it {_shown(said)}"
            yield Problem(key, message, f"leave it out, and set {SAID[path].recipe_key}")
    elif path in PASSES:
        kind, stages = PASSES[path]
        if strategy.stage not in stages:
            only = " or ".join(map(str, stages))
            yield Problem(key, f"means something only with stage {only}", "leave it out, or set strategy.stage")
        elif not _is(kind, value):
            yield Problem(key, f"{_shown(value)} is not {kind}", f"write {kind}")
    else:
        reason = next((REFUSED[part] for part in _prefixes(path) if part in REFUSED), None)
        if value == AUTO and reason is not None:
            return
        if reason is not None:
            yield Problem(key, f"contradicts the recipe: {reason}", "leave it out")
        else:
            yield Problem(key, "is not passed on", _meant(path))


def _meant(path: str) -> str:
    """What to do about a key that is in no table."""
    if close := difflib.get_close_matches(path, [*SAID, *PASSES, *REFUSED], n=1, cutoff=0.8):
        return f"did you mean {close[0]}?"
    names = ", ".join(name.removeprefix("zero_optimization.") for name in PASSES)
    return f"in zero_optimization these are: {names}"


def _prefixes(path: str) -> Iterator[str]:
    """The path itself, then what it lies in, from the inside."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _is(kind: str, value: Any) -> bool:
    if kind == FLAG:
        return isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def passed_on(strategy: Deepspeed) -> dict[str, Any]:
    """What DeepSpeed is told besides what the recipe says."""
    passed: dict[str, Any] = {}
    for path, value in leaves(strategy.deepspeed_config):
        if path not in PASSES:
            continue
        *sections, name = path.split(".")
        inner = passed
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value if isinstance(value, bool) else int(value)
    return passed
