"""What other programs call our keys, so that a habit of theirs gets an answer instead of "no such key". No torch.

docs/coming_from.md shows the same table; a test holds both to the keys that exist.
"""

from __future__ import annotations

TRAINER = {
    "model_name_or_path": "model.path", "model_revision": "model.revision", "tokenizer_name": "model.tokenizer",
    "dataset_name": "data.train", "train_file": "data.train", "validation_file": "data.eval", "output_dir": "run_dir",
    "max_seq_length": "task.max_length", "max_length": "task.max_length", "block_size": "task.max_length",
    "per_device_train_batch_size": "train.micro_batch", "batch_size": "train.micro_batch",
    "per_device_eval_batch_size": "train.eval_batch", "gradient_accumulation_steps": "train.global_batch",
    "num_train_epochs": "train.epochs", "max_steps": "train.steps", "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule", "warmup_ratio": "optim.warmup", "warmup_steps": "optim.warmup",
    "weight_decay": "optim.weight_decay", "adam_beta1": "optim.betas", "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps", "max_grad_norm": "optim.grad_clip",
    "gradient_checkpointing": "train.activation_checkpointing", "packing": "train.packing", "bf16": "model.dtype",
    "fp16": "model.dtype", "torch_dtype": "model.dtype", "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every", "save_steps": "checkpoint.every", "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.best", "report_to": "tracker", "resume_from_checkpoint": "resume",
    "deepspeed": "zero", "run_name": "run_dir",
    "attn_implementation": "model.attention", "lora_r": "adapter.rank", "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout", "target_modules": "adapter.targets", "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
}
AXOLOTL = {
    "base_model": "model.path", "datasets": "data.train", "test_datasets": "data.eval",
    "sequence_len": "task.max_length", "sample_packing": "train.packing", "micro_batch_size": "train.micro_batch",
    "num_epochs": "train.epochs", "lr_scheduler": "optim.schedule", "adapter": "adapter",
    "lora_target_modules": "adapter.targets", "lora_target_linear": "adapter.targets",
    "peft_use_dora": "adapter.dora", "peft_use_rslora": "adapter.rslora", "eval_batch_size": "train.eval_batch",
    "evals_per_epoch": "train.eval_every", "saves_per_epoch": "checkpoint.every",
    "early_stopping_patience": "train.early_stopping", "dataset_prepared_path": "data.cache_dir",
    "wandb_project": "tracker.wandb.project", "wandb_entity": "tracker.wandb.entity",
    "chat_template": "task.template", "output_dir": "run_dir", "learning_rate": "optim.lr",
    "max_steps": "train.steps",
}
LLAMA_FACTORY = {
    "model_name_or_path": "model.path", "dataset": "data.train", "eval_dataset": "data.eval",
    "cutoff_len": "task.max_length", "stage": "task", "finetuning_type": "adapter", "template": "task.template",
    "lora_rank": "adapter.rank", "lora_target": "adapter.targets", "per_device_train_batch_size": "train.micro_batch",
    "learning_rate": "optim.lr", "num_train_epochs": "train.epochs", "output_dir": "run_dir",
}
OTHERS = TRAINER | AXOLOTL | LLAMA_FACTORY
"""Their name -> our key."""

HINTS = {
   
    "gradient_accumulation_steps": "accumulation is derived: global_batch = micro_batch x ranks x accumulation",
    "bf16": "write model.dtype=bf16", "fp16": "write model.dtype=fp16", "stage": "write task=clm or task=instruct",
    "report_to": "write tracker=[tensorboard,wandb]", "deepspeed": "write zero=stage2, or leave it to zero=auto",
    "lora_target_linear": "write adapter.targets=all-linear", "evals_per_epoch": "train.eval_every counts steps",
    "saves_per_epoch": "checkpoint.every counts steps", "finetuning_type": "write adapter=lora or adapter=full",
}
"""What the key alone does not say."""
