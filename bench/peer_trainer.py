"""One training run of a peer, for `bench/peers.py`: transformers' Trainer or TRL's SFTTrainer under DeepSpeed.

Every rank executes this file. The peer gets the token ids that this project's own run trains on, in the same order
of magnitude of rows, and writes per-step seconds, tokens and memory to a json file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

EOS, IGNORE = 50256, -100


def status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


class Watch(TrainerCallback):
    """Seconds of every step, and memory before the first and at the end; the first step's end makes the file `first`."""

    def __init__(self, first: Path):
        self.first = first
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.start_host = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.start_host:
            self.start_host = status("VmRSS")
        self.clock = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.clock)
        if len(self.seconds) == 1:
            self.first.write_text("done")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class Pad:
    """Rows of ids and labels to one padded batch; counts real tokens."""

    def __init__(self):
        self.tokens = 0

    def __call__(self, rows: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in rows)
        self.tokens += sum(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

        mask = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        )
        return {
            "input_ids": padded("input_ids", EOS),
            "labels": padded("labels", IGNORE),
            "attention_mask": mask,
        }


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def deepspeed_config(stage: int, micro: int, dtype: str) -> dict:
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": dtype == "bf16"},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[-1]).read_text())
    dtype = spec.get("dtype", "bf16")
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
    )
    model.config.use_cache = False
    if spec["lora"]:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**spec["lora"], task_type="CAUSAL_LM"))
    common = {
        "output_dir": spec["out"] + ".run",
        "max_steps": spec["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": spec["micro"],
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "bf16": dtype == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "deepspeed": deepspeed_config(spec["stage"], spec["micro"], dtype),
        "report_to": [],
        "gradient_checkpointing": spec.get("checkpointing", False),
        "disable_tqdm": True,
        "seed": 0,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    watch, pad = Watch(Path(spec["out"] + ".first")), Pad()
    if spec["peer"] == "trainer":
        args = TrainingArguments(**common)
        trainer = InOrder(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            data_collator=pad,
            callbacks=[watch],
        )
    else:
        trainer = trl_trainer(spec, common, model, rows, watch)
    trainer.train()
    tokens = pad.tokens if spec["peer"] == "trainer" else trainer.real_tokens
    result = {
        "seconds": watch.seconds,
        "losses": watch.losses,
        "tokens": tokens,
        "start_host_bytes": watch.start_host,
        "peak_host_bytes": status("VmHWM"),
        "attention": model.config._attn_implementation,
    }
    if torch.cuda.is_available():
        result["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    Path(f"{spec['out']}.{trainer.args.process_index}.json").write_text(json.dumps(result))


def trl_trainer(spec: dict, common: dict, model, rows: list[dict], watch: Watch):
    """SFTTrainer that packs examples into rows of `length` tokens, as its documentation recommends for speed."""
    from trl import SFTConfig, SFTTrainer

    examples = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label != IGNORE) for label in row["labels"]],
        }
        for row in rows
    ]

    class Counting(SFTTrainer):
        real_tokens = 0

        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.real_tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    common.pop("remove_unused_columns")
    args = SFTConfig(**common, packing=True, max_length=spec["length"], completion_only_loss=True)
    return Counting(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(examples),
        callbacks=[watch],
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
    )


if __name__ == "__main__":
    main()
