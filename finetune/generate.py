"""`launch/generate.py`: text from an adapter, a merged or full export, or any GPT-J checkpoint.

Prompts come from the argument, a file or standard input; batches are left-padded and give the same text as one by
one. A single greedy or sampled prompt streams to the terminal. Classification exports answer with a label.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from finetune import dist
from finetune.app import Composed
from finetune.assets_path import resolve
from finetune.data.tokenizer import load_tokenizer
from finetune.display import silence_libraries
from finetune.errors import EXIT_DONE, UserError
from finetune.programs import GenerateConfig
from finetune.sample import sample_texts
from finetune.saved import Trained, load_export, typed_task
from finetune.tasks import build_task


def run(composed: Composed) -> int:
    """Answer every prompt."""
    cfg: GenerateConfig = composed.config
    silence_libraries(cfg.verbose, 0)
    _check(cfg)
    prompts = read_prompts(cfg)
    assert cfg.export_dir
    folder = Path(resolve(cfg.export_dir)).expanduser().absolute()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        dist.use_cores(0, 1)
    trained = load_export(folder, cfg.dtype, device)
    tokenizer = load_tokenizer(str(folder))
    if trained.head != "lm":
        raise UserError(f"this export has the head '{trained.head}': it writes no text", "model",
                        "Use launch/evaluate.py model=DIR data.eval=FILE: it writes predictions.jsonl.")
    out = Path(cfg.out).expanduser().open("w", encoding="utf-8") if cfg.out else None
    try:
        for start in range(0, len(prompts), cfg.batch):
            _write(out, _continue(cfg, trained, tokenizer, prompts[start : start + cfg.batch], device), start, cfg)
    finally:
        if out:
            out.close()
    return EXIT_DONE


def _check(cfg: GenerateConfig) -> None:
    if not cfg.export_dir:
        raise UserError("no model is given", "model", "Pass model=RUN_DIR/export, or model=asset:gptj_tiny.")
    if cfg.max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {cfg.max_new_tokens} generates nothing", remedy="Try max_new_tokens=100.")
    if cfg.temperature < 0 or not 0 < cfg.top_p <= 1:
        raise UserError("temperature must be at least 0 and top_p in (0, 1]", remedy="Try temperature=0.9 top_p=0.95.")
    if cfg.batch < 1 or cfg.beams < 1:
        raise UserError("batch and beams must be at least 1", remedy="Try batch=8 beams=1.")


def read_prompts(cfg: GenerateConfig) -> list[str]:
    """Prompts from `prompt=`, the file `prompts=` (a line each, or jsonl with `prompt`), or standard input.

    Raises:
        UserError: none, or a line that is not JSON.
    """
    if cfg.prompt is not None:
        return [cfg.prompt]
    if cfg.prompts is None:
        text = sys.stdin.read().rstrip("\n")
        if not text:
            raise UserError("there is no prompt", "prompt", "Pass prompt='...' or prompts=FILE, or pipe text in.")
        return [text]
    file = Path(cfg.prompts).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", str(file), "Check prompts=FILE.") from None
    return [_prompt_of(line, f"{file}:{n}") if file.suffix == ".jsonl" else line
            for n, line in enumerate(lines, 1) if line.strip()]


def _prompt_of(line: str, where: str) -> str:
    try:
        return str(json.loads(line)["prompt"])
    except (ValueError, KeyError, TypeError):
        raise UserError("not a JSON object with a field 'prompt'", where, 'Write {"prompt": "..."} on each line.') from None


def _continue(cfg: GenerateConfig, trained: Trained, tokenizer, prompts: list[str], device) -> list[dict[str, Any]]:
    shown = [_wrap(trained, tokenizer, prompt) for prompt in prompts] if cfg.chat else prompts
    texts = sample_texts(trained.module, tokenizer, shown, cfg.max_new_tokens, cfg.seed, device, **_options(cfg, tokenizer))
    return [{"prompt": p, "text": _cut(text, list(cfg.stop))} for p, text in zip(prompts, texts, strict=True)]


def _options(cfg: GenerateConfig, tokenizer) -> dict[str, Any]:
    greedy = cfg.temperature == 0 or cfg.beams > 1
    options: dict[str, Any] = {"do_sample": not greedy, "num_beams": cfg.beams}
    options |= {"temperature": None, "top_p": None, "top_k": None} if greedy else {
        "temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}
    if cfg.stop:
        options |= {"stop_strings": list(cfg.stop), "tokenizer": tokenizer}
    return options


def _wrap(trained: Trained, tokenizer, prompt: str) -> str:
    """The prompt in the instruction template that the export was trained with."""
    if trained.settings.get("kind") != "instruct":
        raise UserError("this export was not trained on instructions: it has no template", "chat", "Leave chat out.")
    task = build_task(typed_task(trained.settings), tokenizer, packing=True)
    return tokenizer.decode(task.prompt_ids(prompt))  # type: ignore[attr-defined]


def _cut(text: str, stops: list[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _write(out: TextIO | None, rows: list[dict[str, Any]], start: int, cfg: GenerateConfig) -> None:
    for i, row in enumerate(rows, start):
        if out is not None:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif cfg.prompts is None:
            print(row.get("text") if "text" in row else json.dumps(row, ensure_ascii=False))
        else:
            print(json.dumps({"index": i, **row}, ensure_ascii=False))
