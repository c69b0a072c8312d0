"""Predictions of a classification or question answering model for one text, encoded as in training.

text              -> ids, eos -> head at the last token      -> label(s), probabilities, or number
question, context -> windows  -> head at every context token -> the best span, or no answer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from finetune.data.qa_rows import Question
from finetune.errors import UserError
from finetune.tasks.classify import ClassifyTask, decide
from finetune.tasks.qa import NOTHING, QaTask, best_spans


def classify_text(
    model: nn.Module, task: ClassifyTask, texts: list[str], device: torch.device
) -> dict[str, Any]:
    """Return label (or labels, or number) of one text or a pair, and each label's probability."""
    ids = task.text_ids(texts)
    outputs = _head_outputs(model, ids, device)[-1:]
    if task.regression:
        return {"value": float(outputs[0, 0])}
    verdict = task.read_target(decide(outputs, task.cfg.problem)[0][0].cpu().numpy())
    probabilities = outputs[0].sigmoid() if task.multi else outputs[0].softmax(-1)
    names = task.names or []
    return {
        "labels" if task.multi else "label": verdict,
        "probabilities": {
            name: round(p, 6) for name, p in zip(names, probabilities.tolist(), strict=True)
        },
    }


def answer_questions(
    model: nn.Module, task: QaTask, questions: Iterable[Question], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield the best span of each question's context, its place in characters, and its score.

    The score is that of the span against no answer.

    Raises:
        UserError: a question leaves no room for its context.
    """
    encoder = task.encoder()
    for question in questions:
        context = question.context
        record = {
            "id": question.id,
            "question": question.question,
            "context": context,
            "answers": {"text": [], "answer_start": []},
        }
        windows = encoder.encode([(question.where, record)])[0]
        if isinstance(windows, UserError):
            raise windows

        # The best span over all windows; spans come best first, and blank ones are no answer.
        best, begin, end = float(NOTHING), 0, 0
        for window in windows:
            outputs = _head_outputs(model, [int(i) for i in window["ids"]], device)
            at = int(window["context_at"])
            spans = best_spans(
                outputs[at:].cpu().numpy(), task.cfg.n_best, task.cfg.max_answer_tokens
            )
            for first, last, score in zip(*spans, strict=True):
                start = int(window["char_start"][at + first])
                stop = int(window["char_end"][at + last])
                if score > best and context[start:stop].strip():
                    best, begin, end = float(score), start, stop
                    break

        span = context[begin:end]
        start = begin + len(span) - len(span.lstrip())
        silent = task.unanswerable and -best > task.cfg.null_threshold
        yield {
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
