"""What other tools call things: Hugging Face's TrainingArguments, TRL, axolotl, LLaMA-Factory, torchtune, NeMo.

Name -> (our dotted key, note). Without a key the note says what to do instead. Names are lower case, and none is a
key of ours (a test looks).
"""

from __future__ import annotations

_MICRO = ("train.micro_batch_size", "sequences per forward pass of one rank")
_GLOBAL = ("train.global_batch_size", "sequences per optimizer step over all ranks")
_EPOCHS = ("train.num_epochs", "passes over the training data")
_RATE = ("train.learning_rate", "the peak learning rate")
_MODEL = ("model.path", "hub id, folder or URL")
_LENGTH = ("data.sequence_length", "tokens per sequence")
_PACKING = ("data.packing", "several samples in one sequence, which never see each other")
_LORA_RANK = ("adapter.rank", "with adapter: {type: lora}")
_LORA_ALPHA = ("adapter.alpha", "with adapter: {type: lora}")
_LORA_DROPOUT = ("adapter.dropout", "with adapter: {type: lora}")
_LORA_TARGETS = ("adapter.target_modules", "all-linear, a list of module names, or a regular expression")
_LORA_INIT = ("adapter.init", "kaiming, gaussian, pissa, pissa_niter_4, pissa_niter_16 or olora")
_DORA = ("adapter.use_dora", "with adapter: {type: lora}")
_RSLORA = ("adapter.use_rslora", "with adapter: {type: lora}")
_DTYPE = ("model.dtype", "bfloat16 or float32")
_OUTPUT = ("checkpoint.path", "the run's directory is PATH/NAME")
_DATA = ("data.train", "a list of sources: - {path: …, format: chat | prompt_completion | text}")
_EVAL_DATA = ("data.eval", "a list of held-out sources, or {fraction: 0.02}")
_RECOMPUTE = ("train.activation_checkpointing", "recompute blocks in the backward pass")
_ATTENTION = ("model.attention", "auto, sdpa, eager or flash_attention_2")
_SCHEDULE = ("train.lr_scheduler", "constant, linear, cosine or wsd")
_STRATEGY = ("strategy", "{type: …}; its configuration files are not read")
_WANDB = ("track.wandb", "{project: …, entity: …}")
_CLIP = ("train.max_grad_norm", "the global gradient norm that is clipped to")
_SAVE = ("checkpoint.every_steps", "optimizer steps between saves")
_EVAL = ("evaluate.every_steps", "optimizer steps between evaluations")
_ACCUMULATE = (
    "",
    "accumulation is derived: global_batch_size / (ranks x micro_batch_size); set train.global_batch_size",
)
_RESUME = ("", "leave it out: running the same recipe again continues its unfinished run")
_TF32 = ("", "leave it out: compute precision follows model.dtype")
_QUANTIZED = ("adapter.type", "adapter: {type: qlora} holds the base in 4 bits")
_IN_8_BITS = ("adapter.type", "in 8 bits it is not supported; adapter: {type: qlora} holds the base in 4 bits")
_LOGGING = ("", "leave it out: every step is in metrics.jsonl")
_NODES = ("cluster.nodes", "or --nodes on the command line")
_GPUS = ("cluster.gpus_per_node", "or --gpus-per-node on the command line")

FOREIGN_NAMES: dict[str, tuple[str, str]] = {
    # batch
    "per_device_train_batch_size": _MICRO,
    "per_gpu_train_batch_size": _MICRO,
    "per_device_eval_batch_size": _MICRO,
    "eval_batch_size": _MICRO,
    "train_micro_batch_size_per_gpu": _MICRO,
    "train_batch_size": _GLOBAL,
    "batch_size": _GLOBAL,
    "gradient_accumulation_steps": _ACCUMULATE,
    "accumulate_grad_batches": _ACCUMULATE,
    # duration
    "num_train_epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "max_epochs": _EPOCHS,
    "total_steps": ("train.max_steps", "optimizer steps"),
    "max_steps_per_epoch": ("train.max_steps", "optimizer steps of the whole run"),
    # optimiser and schedule
    "lr": _RATE,
    "max_lr": _RATE,
    "min_lr": ("train.min_lr_ratio", "the final rate as a share of the peak"),
    "lr_scheduler_type": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "lr_scheduler_kwargs": ("", "set train.min_lr_ratio, train.warmup_ratio or train.decay_ratio"),
    "warmup": ("train.warmup_steps", "or train.warmup_ratio"),
    "num_warmup_steps": ("train.warmup_steps", "steps over which the rate rises"),
    "optim": ("train.optimizer", "adamw, adamw_8bit, adafactor or muon"),
    "adam_beta1": ("train.betas", "a list of two numbers"),
    "adam_beta2": ("train.betas", "a list of two numbers"),
    "adam_epsilon": ("train.eps", "AdamW's epsilon"),
    "gradient_clipping": _CLIP,
    "gradient_clip_val": _CLIP,
    "clip_grad": _CLIP,
    "data_seed": ("train.seed", "one seed for data order, new tensors and dropout"),
    "random_seed": ("train.seed", "one seed for data order, new tensors and dropout"),
    # model
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "model_id": _MODEL,
    "base_model": _MODEL,
    "pretrained_model_name_or_path": _MODEL,
    "tokenizer_name": ("model.tokenizer", "folder, URL or hub id"),
    "tokenizer_path": ("model.tokenizer", "folder, URL or hub id"),
    "model_revision": ("model.revision", "branch, tag or commit"),
    "template": ("model.chat_template", "a Jinja template or .jinja file; left out: the tokenizer's own"),
    "torch_dtype": _DTYPE,
    "bf16": _DTYPE,
    "fp16": ("model.dtype", "bfloat16 or float32; fp16 is not supported"),
    "precision": _DTYPE,
    "tf32": _TF32,
    "attn_implementation": _ATTENTION,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "freeze_layers": ("model.train_layers", "patterns of the parameters to train, the others are frozen"),
    "unfrozen_parameters": ("model.train_layers", "patterns of the parameters to train"),
    "trust_remote_code": ("", "leave it out: only architectures that transformers itself contains are loaded"),
    # adapter
    "lora": ("adapter", "{type: lora, rank: 16, alpha: 32}"),
    "lora_rank": _LORA_RANK,
    "lora_r": _LORA_RANK,
    "r": _LORA_RANK,
    "lora_alpha": _LORA_ALPHA,
    "lora_dropout": _LORA_DROPOUT,
    "lora_target": _LORA_TARGETS,
    "lora_target_modules": _LORA_TARGETS,
    "lora_target_linear": _LORA_TARGETS,
    "lora_attn_modules": _LORA_TARGETS,
    "init_lora_weights": _LORA_INIT,
    "peft_init_lora_weights": _LORA_INIT,
    "pissa_init": _LORA_INIT,
    "pissa_iter": _LORA_INIT,
    "dora": _DORA,
    "lora_use_dora": _DORA,
    "peft_use_dora": _DORA,
    "rslora": _RSLORA,
    "lora_use_rslora": _RSLORA,
    "peft_use_rslora": _RSLORA,
    "lora_modules_to_save": ("adapter.modules_to_save", "modules trained in full"),
    "peft": ("adapter", "{type: lora, rank: 16, alpha: 32}"),
    "peft_config": ("adapter", "{type: lora, rank: 16, alpha: 32}"),
    "finetuning_type": ("adapter", "left out: full fine-tuning"),
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _IN_8_BITS,
    "bnb_4bit_quant_type": _QUANTIZED,
    "qlora": ("adapter", "{type: qlora, rank: 16, alpha: 32}"),
    "quantization_bit": _QUANTIZED,
    # method
    "train_on_inputs": ("method.train_on", "assistant, last_assistant, completion or all"),
    "train_on_prompt": ("method.train_on", "assistant, last_assistant, completion or all"),
    "assistant_only_loss": ("method.train_on", "assistant is the default"),
    "completion_only_loss": ("method.train_on", "a completion alone is supervised unless it says all"),
    # data
    "dataset": _DATA,
    "datasets": _DATA,
    "dataset_name": _DATA,
    "dataset_path": _DATA,
    "train_file": _DATA,
    "train_ds": _DATA,
    "data_files": ("path", "a file, folder, glob, or a list of them"),
    "dataset_text_field": ("columns", "of a source: {text: COLUMN}"),
    "field_messages": ("columns", "of a source: {messages: COLUMN}"),
    "test_datasets": _EVAL_DATA,
    "eval_dataset": _EVAL_DATA,
    "validation_file": _EVAL_DATA,
    "validation_ds": _EVAL_DATA,
    "val_set_size": ("data.eval", "{fraction: 0.02}"),
    "val_size": ("data.eval", "{fraction: 0.02}"),
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_length": _LENGTH,
    "seq_length": _LENGTH,
    "cutoff_len": _LENGTH,
    "sequence_len": _LENGTH,
    "block_size": _LENGTH,
    "sample_packing": _PACKING,
    "packed": _PACKING,
    "pad_to_sequence_len": ("", "leave it out: sequences always have data.sequence_length tokens"),
    "dataloader_num_workers": ("", "leave it out: readers run in the background by themselves"),
    "preprocessing_num_workers": ("", "leave it out: rows are tokenised while training runs"),
    # saving, evaluating, reporting
    "output_dir": _OUTPUT,
    "save_dir": _OUTPUT,
    "logging_dir": _OUTPUT,
    "run_name": ("name", "the run's name, at the top level"),
    "save_steps": _SAVE,
    "save_strategy": _SAVE,
    "save_every_n_steps": _SAVE,
    "saves_per_epoch": _SAVE,
    "save_total_limit": ("checkpoint.keep_last", "newest checkpoints kept, the best one besides"),
    "eval_steps": _EVAL,
    "eval_strategy": _EVAL,
    "evaluation_strategy": _EVAL,
    "evals_per_epoch": _EVAL,
    "val_check_interval": _EVAL,
    "eval_on_start": ("evaluate.at_start", "measure the untrained model"),
    "early_stopping_patience": ("evaluate.early_stopping", "{metric: NAME/loss, patience: 3}"),
    "metric_for_best_model": ("evaluate.early_stopping", "{metric: NAME/loss, patience: 3}"),
    "load_best_model_at_end": ("evaluate.early_stopping", "with it the best checkpoint is kept"),
    "logging_steps": _LOGGING,
    "log_every_n_steps": _LOGGING,
    "report_to": ("track", "tensorboard: true, wandb: {project: …}"),
    "wandb_project": _WANDB,
    "wandb_entity": _WANDB,
    "resume_from_checkpoint": _RESUME,
    "auto_resume_from_checkpoints": _RESUME,
    # where and how it runs
    "deepspeed": ("strategy", "{type: deepspeed, stage: 3}; keys of its configuration go into deepspeed_config"),
    "fsdp_config": _STRATEGY,
    "fsdp_version": _STRATEGY,
    "gradient_checkpointing": _RECOMPUTE,
    "enable_activation_checkpointing": _RECOMPUTE,
    "torch_compile": ("train.compile", "torch.compile each block"),
    "num_nodes": _NODES,
    "nnodes": _NODES,
    "num_gpus": _GPUS,
    "nproc_per_node": _GPUS,
    "gpus": _GPUS,
    "devices": _GPUS,
    "fsdp": ("strategy", "{type: fsdp}; its configuration files are not read"),
}
