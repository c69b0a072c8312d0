"""Predictions of a classification or question answering model for one text, encoded as in training.

text              -> ids, eos -> head at the last token      -> label(s), probabilities, or number
question, context -> windows  -> head at every context token -> the best span, or no answer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.tasks.classify import ClassifyTask, decide
from finetune.tasks.qa import NOTHING, QaTask, best_spans


def classify_text(
    model: nn.Module, task: ClassifyTask, texts: list[str], device: torch.device
) -> dict[str, Any]:
    """Return label (or labels, or number) of one text or a pair, and each label's probability."""
    ids = task.text_ids(texts)
    outputs = _head_outputs(model, ids, device)[-1:]
    verdict = task.read_target(decide(outputs, task.cfg.problem)[0][0].cpu().numpy())
    if task.regression:
        return {"value": verdict}
    probabilities = outputs[0].sigmoid() if task.multi else outputs[0].softmax(-1)
    names = task.names or []
    return {
        "labels" if task.multi else "label": verdict,
        "probabilities": {
            name: round(p, 6) for name, p in zip(names, probabilities.tolist(), strict=True)
        },
    }


def answer_question(
    model: nn.Module, task: QaTask, question: str, context: str, device: torch.device
) -> dict[str, Any]:
    """Return the best span of `context`, its place in characters, and its score against no answer.

    Raises:
        UserError: the question leaves no room for the context.
    """
    record = {
        "id": "0",
        "question": question,
        "context": context,
        "answers": {"text": [], "answer_start": []},
    }
    examples = task.encoder().encode([("question", record)])[0]
    if isinstance(examples, UserError):
        raise examples
    best, place = float(NOTHING), (0, 0)
    for example in examples:
        outputs = _head_outputs(model, [int(i) for i in example["ids"]], device)
        at = int(example["context_at"])
        first, last, scores = best_spans(
            outputs[at:].cpu().numpy(), task.cfg.n_best, task.cfg.max_answer_tokens
        )
        places = [
            (int(example["char_start"][at + a]), int(example["char_end"][at + b]))
            for a, b in zip(first, last, strict=True)
        ]
        for value, (begin, end) in zip(
            scores.tolist(), places, strict=True
        ):  # best first; blank spans are no answer
            if value > best and context[begin:end].strip():
                best, place = value, (begin, end)
                break
    span = context[place[0] : place[1]]
    start = place[0] + len(span) - len(span.lstrip())
    silent = task.unanswerable and -best > task.cfg.null_threshold
    return {
        "answer": "" if silent else span.strip(),
        "start": start,
        "end": start + len(span.strip()),
        "score": round(best, 4),
        "best_span": span.strip(),
    }


def _head_outputs(model: nn.Module, ids: list[int], device: torch.device) -> torch.Tensor:
    """Return the head's outputs (T, outputs) in fp32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids], device=device))[0].float()
