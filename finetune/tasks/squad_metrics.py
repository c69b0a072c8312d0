"""SQuAD's exact match and F1, by the official normalisation and rules, as shares from 0 to 1.

Follows evaluate-v1.1.py and evaluate-v2.0.py (Rajpurkar et al.): lower case, no punctuation, no
articles, single spaces; the best of the annotated answers counts; a question without an answer is
right only if nothing is answered. Imports no torch: texts in, numbers out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words of prediction and answer.

    If either has no words, the result is 1 if both have none, else 0.
    """
    words, wanted = normalise(prediction).split(), normalise(answer).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def score(prediction: str, answers: list[str]) -> tuple[float, float]:
    """Return (exact match, F1) of one question.

    Members of `answers` without any word in them do not count, as in v2.
    """
    wanted = [answer for answer in answers if normalise(answer)] or [""]
    exact = float(any(normalise(prediction) == normalise(answer) for answer in wanted))
    return exact, max(f1(prediction, answer) for answer in wanted)


def score_v1(prediction: str, answers: list[str]) -> tuple[float, float]:
    """Return (exact match, F1) of one question by the rules of v1.1.

    This is for data without unanswerable questions. In contrast to `score`, every answer counts,
    and without a common word F1 is 0, even if neither side has a word.
    """
    exact = float(any(normalise(prediction) == normalise(answer) for answer in answers))
    return exact, max(
        f1(prediction, answer) if normalise(answer) and normalise(prediction) else 0.0
        for answer in answers
    )


def summarise(scores: list[tuple[float, float]], answerable: list[bool]) -> dict[str, Any]:
    """Return means over all questions; if some are unanswerable, also over each of both kinds."""
    total: dict[str, Any] = _mean(scores)
    if not all(answerable):
        for name, kind in (("has_answer", True), ("no_answer", False)):
            total[name] = _mean([s for s, a in zip(scores, answerable, strict=True) if a is kind])
    return total


def best_threshold(
    spans: list[float], margins: list[float], answerable: list[bool]
) -> tuple[float, float]:
    """Return the null threshold with the best F1 in hindsight, and that F1.

    Args:
        spans: F1 of each question's best span, were it answered.
        margins: null score minus the best span's score.
    """
    total = float(answerable.count(False))
    best, threshold = total, min(margins, default=0.0) - 1.0
    for margin, value, has_answer in sorted(zip(margins, spans, answerable, strict=True)):
        total += value - (not has_answer)
        if total > best:
            best, threshold = total, margin
    return threshold, best / max(1, len(spans))


def _mean(scores: list[tuple[float, float]]) -> dict[str, Any]:
    n = max(1, len(scores))
    return {
        "exact_match": sum(exact for exact, _ in scores) / n,
        "f1": sum(f for _, f in scores) / n,
        "questions": len(scores),
    }
