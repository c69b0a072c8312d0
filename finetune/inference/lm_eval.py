"""Evaluation with EleutherAI's lm-eval, the field's own tool (https://github.com/EleutherAI/lm-evaluation-harness).

The loaded model goes into lm-eval's own `hf` model as transformers' GPT-J, so tasks, prompts, metrics and arithmetic are
what everybody measures with. Adapters of virtual tokens answer through the training forward.
An optional extra: pip install -e '.[eval]'.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import RunFailed, UserError
from finetune.gptj.library import takes_virtual_tokens, to_library_model
from finetune.inference.sample import Sampling, continue_flat

SKIPPED = ("alias", "name", "sample_len", "samples")


def check_suite(tasks: list[str], task_dir: str | None) -> None:
    """Check, before a model is loaded, that lm-eval is installed and that tasks are named.

    Raises:
        UserError: no tasks, or the extra is missing.
    """
    try:
        import accelerate  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"suite=lm_eval needs an extra package: {error}",
            "suite",
            "Install it: pip install -e '.[eval]'",
        ) from None
    if not tasks:
        raise UserError(
            "suite=lm_eval needs tasks",
            "tasks",
            "Try tasks=lambada_openai, or tasks=[piqa,hellaswag].",
        )
    if task_dir and not Path(task_dir).expanduser().is_dir():
        raise UserError(
            f"there is no directory {task_dir}", "task_dir", "It holds lm-eval's task yaml files."
        )


@cache
def task_index(include: str | None):
    """Return lm-eval's list of tasks, with those of a folder; its 14,000 files take ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def run_suite(
    model: nn.Module,
    tokenizer,
    tasks: list[str],
    task_dir: str | None,
    *,
    fewshot: int | None,
    limit: float | None,
    batch: int,
    seed: int,
    chat: bool,
) -> dict[str, Any]:
    """Return lm-eval's figures.

    {"tasks": {task: {metric: value}}, "settings": {task: {"version": .., "samples": ..}}}

    Args:
        task_dir: folder with the user's own task files (yaml), which may read local data.
        limit: number of examples of each task, or below 1 a share of them; None: all.
        batch: sequences per forward.
        chat: put prompts into the tokenizer's template.

    Raises:
        UserError: a task is unknown, or there is no template.
        RunFailed: lm-eval failed, for example on data that it cannot download.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    include = str(Path(task_dir).expanduser().absolute()) if task_dir else None
    manager = task_index(include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"lm-eval has no task {', '.join(unknown)}",
            "tasks",
            "List them: lm-eval ls tasks. Own tasks: task_dir=FOLDER with their yaml files.",
        )
    if chat and not tokenizer.chat_template:
        raise UserError(
            "this model's tokenizer has no chat template",
            "chat",
            "Exports of task=instruct have one.",
        )
    if takes_virtual_tokens(model):
        kind = _flat_lm(HFLM)
    else:
        kind, model = HFLM, to_library_model(model)
    judged = kind(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")  # type: ignore[arg-type]
    try:
        results = lm_eval.simple_evaluate(
            model=judged,
            tasks=manager.match_tasks(tasks),
            num_fewshot=fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            apply_chat_template=chat,
        )
    except Exception as error:  # data sets that are not there, broken yaml, ...: no common class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RunFailed(
            f"lm-eval failed ({type(error).__name__}: {reason[:300]})",
            "tasks",
            "Without a network only tasks with local data work: task_dir=FOLDER.",
        ) from None
    assert results is not None
    rows = results["results"]
    samples = {task: counts["effective"] for task, counts in results["n-samples"].items()}
    settings = {"version": lm_eval.__version__, "fewshot": fewshot, "limit": limit, "chat": chat}
    return {
        "tasks": {task: figures(row) for task, row in rows.items()},
        "settings": {task: settings | {"samples": samples.get(task)} for task in rows},
    }


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of one task; lm-eval names them "metric,filter", mostly "metric,none"."""
    return {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if key not in SKIPPED and isinstance(value, (int, float))
    }


def _flat_lm(base: type) -> type:
    """Return a subclass of lm-eval's model `base` that computes with the training forward.

    For likelihoods rows are padded on the right, where a causal model does not see it.
    """

    class FlatLM(base):
        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                return self.model(input_ids=inps)

        def _model_generate(self, context, max_length, stop, attention_mask, **options):
            temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            how = Sampling(
                max_length - context.shape[1], temperature, options.get("top_p", 1.0), stop=stop
            )
            prompts = [
                ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)
            ]
            rows = continue_flat(self.model, self.tokenizer, prompts, how, self.device)
            width, eos = max(map(len, rows), default=0), self.tokenizer.eos_token_id
            new = torch.tensor(
                [row + [eos] * (width - len(row)) for row in rows], dtype=context.dtype
            )
            return torch.cat([context, new.to(context.device)], 1)

    return FlatLM
