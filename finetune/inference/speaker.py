"""An export opened for use: the model, its tokenizer and its task."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import dist, process
from finetune.assets.paths import resolve
from finetune.config import read_gptj_config
from finetune.data.tokenizer import TokenLimit, load_tokenizer, token_limit
from finetune.errors import UserError
from finetune.export.reopen import (
    Trained,
    foreign_note,
    load_export,
    model_folder,
    read_about,
    typed_task,
)
from finetune.gptj.library import takes_virtual_tokens, to_library_model
from finetune.inference.deepspeed_inference import accelerated, refuse_engine
from finetune.inference.sample import Sampling, continue_flat, continue_ids
from finetune.tasks.build import build_task

TOO_LARGE = (
    "Write the text without it, or give the model the rows: "
    "model.resize_token_embeddings(len(tokenizer)) in "
    "transformers, and train them."
)

ENGINES = ("torch", "compiled", "deepspeed")


@dataclass
class Speaker:
    """A model, its tokenizer and its task."""

    trained: Trained
    tokenizer: Any
    task: Any
    device: torch.device
    limit: TokenLimit | None = None
    """Set where the tokenizer has ids that the model has no row for."""
    compiled: bool = False
    """Decode by a compiled forward; see `sample.continue_ids`."""

    @property
    def chats(self) -> bool:
        return hasattr(self.task, "prompt_ids")

    @property
    def positions(self) -> int:
        """Positions for text: a prompt or prefix adapter's virtual tokens take theirs."""
        module: Any = self.trained.module
        taken = module.active_peft_config.num_virtual_tokens if takes_virtual_tokens(module) else 0
        return int(module.config.n_positions) - taken

    def ids(self, prompt: Any, chat: bool) -> list[int]:
        """Return the ids of a prompt.

        Args:
            chat: put the prompt, or the conversation, into the export's template.

        Raises:
            UserError: the model has no row for one of them.
        """
        if chat:
            ids = self.task.prompt_ids(prompt)
        else:
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = ids or [self.tokenizer.eos_token_id]
        if self.limit:
            self.limit.check(ids, "the prompt")
        return ids

    def continue_ids(
        self, prompts: list[list[int]], how: Sampling, streamer=None
    ) -> list[list[int]]:
        """Generate the ids that follow each prompt; see `sample.continue_ids`."""
        module = self.trained.module
        if takes_virtual_tokens(module):
            return continue_flat(module, self.tokenizer, prompts, how, self.device, streamer)
        return continue_ids(
            module, self.tokenizer, prompts, how, self.device, streamer, self.compiled
        )


def load_speaker(
    export_dir: str,
    dtype,
    engine: str = "torch",
    base: str | None = None,
    before_weights: Callable[[Speaker, str], None] = lambda speaker, head: None,
) -> Speaker:
    """Open an export (adapter, merged or full) or any GPT-J checkpoint for use.

    Args:
        base: an adapter's base model, where the adapter does not name it or it lies elsewhere here.
        before_weights: called with a speaker without its model, and the head, before the weights
            are loaded; an error that it raises ends the loading.

    Raises:
        UserError: there is no such folder, or `engine` cannot run here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if engine not in ENGINES:
        choices = ", ".join(ENGINES)
        raise UserError(f"engine = {engine} is unknown", "engine", f"Choose from {choices}.")
    if engine == "deepspeed" and device.type != "cuda":
        raise UserError(
            "DeepSpeed-Inference needs a GPU; this machine has none", "engine", "Leave engine out."
        )
    if device.type == "cpu":
        dist.use_cores(0, 1)

    # The tokenizer and the task come from small files, so that wrong prompts are refused first.
    folder = Path(resolve(export_dir)).expanduser().absolute()
    about = read_about(folder, base)
    if note := foreign_note(about):
        print(note, file=sys.stderr)
    if engine != "torch":
        refuse_engine(engine, folder, about)
    tokenizer = load_tokenizer(str(folder))
    task = build_task(typed_task(about["settings"]), tokenizer, packing=True)
    task.prepare(None, about["task"])
    rows = read_gptj_config(model_folder(folder, about))["vocab_size"]
    limit = token_limit(tokenizer, rows, TOO_LARGE)
    unloaded = Speaker(None, tokenizer, task, device, limit, engine == "compiled")  # type: ignore[arg-type]
    before_weights(unloaded, about["head"])

    trained = load_export(folder, dtype, device, base)
    if device.type == "cpu":
        process.keep_freed_memory()
    if engine == "deepspeed":
        trained.module = accelerated(trained.module, folder, about, device)
    elif trained.head == "lm" and not takes_virtual_tokens(trained.module):
        trained.module = to_library_model(trained.module)
    return replace(unloaded, trained=trained)
