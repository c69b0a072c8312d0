"""Evaluation with EleutherAI's lm-eval, the field's own tool (https://github.com/EleutherAI/lm-evaluation-harness).

names -> `load_tasks` -> lm-eval's tasks with their data; a model -> `judged` -> lm-eval's `hf` model; both -> `ask` -> figures

Tasks, prompts, metrics and arithmetic are lm-eval's own, so that everybody measures the same. A model that was
trained is asked as transformers' GPT-J, one in training, or with virtual tokens, through the training forward.
An optional extra: pip install -e '.[eval]'.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.config import direction_of
from finetune.errors import Interrupted, RunFailed, UserError
from finetune.gptj.library import takes_virtual_tokens, to_library_model
from finetune.inference.sample import Sampling, continue_flat

SKIPPED = ("alias", "name", "sample_len", "samples")
Tasks = dict[str, Any]
"""Tasks and groups as lm-eval loads them: {"tasks": {name: task}, "groups": {name: group}, ..}."""


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
def task_index(include: str | None, defaults: bool = True):
    """Return lm-eval's list of tasks, with those of a folder; its own 14,000 files take ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def load_tasks(
    names: list[str],
    task_dir: str | None,
    fewshot: int | None = None,
    *,
    seed: int,
    section: str = "",
) -> Tasks:
    """Load tasks of lm-eval with their data, which they may download.

    Args:
        task_dir: folder with the user's own task files (yaml), which may read local data.
        fewshot: worked examples in each prompt; None: the task's own number.
        seed: of tasks that draw among their data.
        section: prefix of the keys that an error names, such as `eval.`.

    Raises:
        UserError: a task is unknown, its data are not there, or a model of texts cannot do it.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    key = f"{section}lm_eval" if section else "tasks"
    include = str(Path(task_dir).expanduser().absolute()) if task_dir else None
    manager = task_index(include, defaults=False) if include else None
    # Groups and tags of a folder may hold tasks of lm-eval's own.
    if not manager or any(name not in manager.all_subtasks for name in names):
        manager = task_index(include)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"lm-eval has no task {', '.join(unknown)}",
            key,
            f"List them: lm-eval ls tasks. Own tasks: {section}task_dir=FOLDER with their yaml "
            "files.",
        )
    try:
        with seeded(seed, torch.device("cpu")):
            tasks = manager.load(manager.match_tasks(names))
    except Exception as error:  # data sets that are not there, broken yaml, ...: no common class
        raise UserError(
            f"lm-eval cannot load {', '.join(names)} ({_reason(error)})",
            key,
            f"Without a network only tasks with local data work: {section}task_dir=FOLDER.",
        ) from None
    for name, task in tasks["tasks"].items():
        for trait, what in (("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "shows pictures")):
            if getattr(task, trait, False):
                raise UserError(f"{name} {what}, which is not done here", key, "Leave it out.")
        # As lm-eval's own command does: a 0 in a task's file stays.
        usual = task.get_config("num_fewshot")
        if usual is None or (fewshot is not None and usual != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
    return tasks


def check_metric(tasks: Tasks, metric: str) -> None:
    """Check that loaded tasks have a metric, TASK/METRIC, and which end of it is the better one.

    Raises:
        UserError: they have not, or a task of one's own turns a metric round.
    """
    ends: dict[str, bool | None] = {}
    for name, task in tasks["tasks"].items():
        filters = [part.name for part in getattr(task, "_filters", [])] or ["none"]
        for one, higher in task.higher_is_better().items():
            ends |= {f"{name}/{short(f'{one},{part}')}": higher for part in filters}
    for name, group in tasks["groups"].items():
        for part in group.aggregate_metric_list or []:
            for label in part.filter_list or ["none"]:
                ends[f"{name}/{short(f'{part.metric},{label}')}"] = None
    if metric not in ends:
        raise UserError(
            f"train.metric = {metric} is no metric of lm-eval's tasks",
            "",
            f"Choose from {', '.join(list(ends)[:20])}.",
        )
    higher = ends[metric]
    if higher is not None and higher != (direction_of(metric) == "max"):
        raise UserError(
            f"train.metric = {metric}: the task's file has higher_is_better: "
            f"{str(higher).lower()}, and "
            "a metric of this name is taken to have its better end at the "
            f"{direction_of(metric)}imum",
            "",
            "Give the metric another end, or another name, in the task's file.",
        )


def judged(
    model: nn.Module,
    tokenizer,
    batch: int,
    *,
    device: torch.device | None = None,
    after_batch: Callable[[], None] = lambda: None,
    agree: Callable[[list[int]], list[int]] = list,
):
    """Return lm-eval's model around one of ours.

    Args:
        batch: sequences per forward.
        device: of a model in training, which is asked through its own forward; None: it is trained.
        after_batch: called after every forward, or batch of generated texts.
        agree: see `continue_flat`.
    """
    from lm_eval.models.huggingface import HFLM

    if device or takes_virtual_tokens(model):
        kind = _flat_lm(HFLM, after_batch, agree)
    else:
        kind, model = HFLM, to_library_model(model)
    lm = kind(
        pretrained=model,  # type: ignore[arg-type]
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
        batch_size=batch,
        backend="causal",
    )
    if device:
        lm._device = device  # not the model's own: sharded weights may lie elsewhere
    return lm


def ask_in_training(
    model: nn.Module,
    tokenizer,
    tasks: Tasks,
    limit: float | None,
    *,
    after_batch: Callable[[], None],
    batch: int,
    seed: int,
    device: torch.device,
    agree: Callable[[list[int]], list[int]] = list,
) -> dict[str, dict[str, float]]:
    """Ask a model in training, and return {task: {metric: value}}.

    Every rank asks everything, since at ZeRO stage 3 each has to take part in every forward.
    Other arguments: see `judged` and `ask`.
    """
    lm = judged(model, tokenizer, batch, device=device, after_batch=after_batch, agree=agree)
    return ask(lm, tasks, limit=limit, seed=seed, bars=False)["tasks"]


def ask(
    lm,
    tasks: Tasks,
    *,
    limit: float | None,
    seed: int,
    chat: bool = False,
    resamples: int = 0,
    bars: bool = True,
) -> dict[str, Any]:
    """Return lm-eval's figures.

    {"tasks": {task: {metric: value}}, "samples": {task: number}}

    The state of all random generators is as before.

    Args:
        lm: see `judged`.
        limit: number of examples of each task, or below 1 a share of them; None: all.
        seed: of few-shot examples, and of tasks that draw.
        chat: put prompts into the tokenizer's template.
        resamples: draws of the bootstrap for standard errors; 0: none.
        bars: show lm-eval's progress bars.

    Raises:
        Interrupted: `after_batch` raised it.
        RunFailed: lm-eval failed.
    """
    from lm_eval.evaluator import evaluate

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with seeded(seed, lm.device), nullcontext() if bars else without_bars():
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=seed)
        try:
            results = evaluate(
                lm=lm,
                task_dict=tasks,
                limit=limit,
                bootstrap_iters=resamples,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
            )
        except Interrupted:
            raise
        except Exception as error:  # broken rows of a task, ...: no common class
            raise RunFailed(
                f"lm-eval failed ({_reason(error)})", ", ".join(tasks["tasks"])
            ) from None
    assert results is not None
    return {
        "tasks": {task: figures(row) for task, row in results["results"].items()},
        "samples": {task: counts["effective"] for task, counts in results["n-samples"].items()},
    }


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators, and restore their states afterwards."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide progress bars; lm-eval has no switch for all of its own."""
    from tqdm import tqdm

    usual = tqdm.__init__

    def hidden(bar, *arguments, **options) -> None:
        usual(bar, *arguments, **options | {"disable": True})

    tqdm.__init__ = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = usual  # type: ignore[method-assign]


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of one task."""
    return {
        short(key): float(value)
        for key, value in row.items()
        if key not in SKIPPED and isinstance(value, (int, float))
    }


def short(metric: str) -> str:
    """Return lm-eval's `metric,filter` without the filter that does nothing."""
    return metric.removesuffix(",none")


def _reason(error: Exception) -> str:
    """Return the kind of an error and its first line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}"


def _flat_lm(
    base: type, after_batch: Callable[[], None], agree: Callable[[list[int]], list[int]]
) -> type:
    """Return a subclass of lm-eval's model `base` that computes with the training forward.

    For likelihoods rows are padded on the right, where a causal model does not see it.
    """

    class FlatLM(base):
        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                logits = self.model(input_ids=inps)
            after_batch()
            return logits

        def _model_generate(self, context, max_length, stop, attention_mask, **options):
            temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            how = Sampling(
                max_length - context.shape[1], temperature, options.get("top_p", 1.0), stop=stop
            )
            prompts = [
                ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)
            ]
            rows = continue_flat(self.model, self.tokenizer, prompts, how, self.device, agree=agree)
            width, eos = max(map(len, rows), default=0), self.tokenizer.eos_token_id
            new = torch.tensor(
                [row + [eos] * (width - len(row)) for row in rows], dtype=context.dtype
            )
            after_batch()
            return torch.cat([context, new.to(context.device)], 1)

    return FlatLM
