"""Rows of question answering data -> questions, every answer checked against its context.

    article    {"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
               "is_impossible"}]}]}                                SQuAD v1.1 and v2: the elements of the file's "data"
    flat       {"id", "context", "question", "answers": {"text": [..], "answer_start": [..]}}      as on the hub

`answer_start` counts characters of the context. A question without answers is unanswerable; some exports write
{"text": "", "answer_start": -1} instead. Tokenises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union

from finetune.data.fields import full_text, parsed_cell, shown
from finetune.data.formats import json_type
from finetune.data.utf8 import FIX, SKIP
from finetune.errors import UserError

LAYOUTS = (
    'Write each row as a SQuAD article {"title", "paragraphs": [...]} or as a question '
    '{"id", "context", "question", "answers": {"text": [..], "answer_start": [..]}}'
)


@dataclass(frozen=True)
class Question:
    where: str
    """file and id, for messages."""
    id: str
    context: str
    question: str
    answers: list[tuple[int, str]]
    """(first character, text) of each annotation; none: the context does not answer it."""


def questions(record: dict, where: str) -> Iterator[Union[Question, UserError]]:
    """The row's questions; of an article the good ones too when others are bad."""
    try:
        if "paragraphs" in record:
            yield from _article(record, where)
        elif "question" in record or "context" in record:
            yield _flat(record, where)
        else:
            present = ", ".join(f"'{name}'" for name in list(record)[:12]) or "no field at all"
            raise UserError(
                f"the row is neither an article nor a question; it has {present}",
                where,
                f"{LAYOUTS}, {SKIP}",
            )
    except UserError as error:
        yield error


def without_answers(record: dict) -> dict:
    """The row as a question alone, whatever answers it has or lacks: what a model is asked."""
    if "paragraphs" not in record:
        return record | {"answers": []} if "question" in record or "context" in record else record
    if not isinstance(record["paragraphs"], list):
        return record
    paragraphs = []
    for paragraph in record["paragraphs"]:
        entries = paragraph.get("qas") if isinstance(paragraph, dict) else None
        if isinstance(entries, list):
            kept = [
                {k: entry[k] for k in ("id", "question") if k in entry} | {"answers": []}
                if isinstance(entry, dict)
                else entry
                for entry in entries
            ]
            paragraph = paragraph | {"qas": kept}
        paragraphs.append(paragraph)
    return record | {"paragraphs": paragraphs}


def _article(record: dict, where: str) -> Iterator[Union[Question, UserError]]:
    for i, paragraph in enumerate(_list(record["paragraphs"], "'paragraphs'", where)):
        place = f"{where} paragraph {i}"
        try:
            context = full_text(_get(paragraph, "context", place), "'context'", place)
            entries = _list(_get(paragraph, "qas", place), "'qas'", place)
        except UserError as error:
            yield error
            continue
        for j, entry in enumerate(entries):
            yield _checked(entry, context, place, j)


def _checked(entry: Any, context: str, place: str, number: int) -> Question | UserError:
    try:
        name = _get(entry, "id", f"{place} question {number}", default=f"question {number}")
        where = f"{place} id {name}"
        impossible = entry.get("is_impossible")
        given = (
            [] if impossible is True and "answers" not in entry else _get(entry, "answers", where)
        )
        annotated = _list(given, "'answers'", where)
        answers = [
            _annotation(answer, where)
            for answer in annotated
            if not _is_none(answer, impossible is True)
        ]
        if impossible is True and answers:
            raise UserError(
                f"is_impossible is true, yet there is the answer {shown(answers[0][1])}",
                where,
                f"Empty 'answers', or set is_impossible to false, {SKIP}",
            )
        if impossible is False and not answers:
            raise UserError(
                "is_impossible is false, yet 'answers' is empty",
                where,
                f"Add the answer, or set is_impossible to true, {SKIP}",
            )
        return _question(where, str(name), context, _get(entry, "question", where), answers)
    except UserError as error:
        return error


def _flat(record: dict, where: str) -> Question:
    name = record.get("id")
    place = f"{where} id {name}" if name is not None else where
    context = full_text(_get(record, "context", place), "'context'", place)
    answers = parsed_cell(_get(record, "answers", place))
    pairs = (
        [_annotation(answer, place) for answer in answers if not _is_none(answer)]
        if isinstance(answers, list)
        else _columns(answers, place)
    )
    return _question(
        place, str(where if name is None else name), context, _get(record, "question", place), pairs
    )


def _columns(answers: Any, where: str) -> list[dict[str, Any]]:
    """Annotations of the flat layout, where texts and starts are two lists."""
    if not isinstance(answers, dict):
        raise UserError(
            f"'answers' is {json_type(answers)}, not an object",
            where,
            f'Write it as {{"text": ["Paris"], "answer_start": [17]}}, empty lists for no answer, {SKIP}',
        )
    texts = _list(_get(answers, "text", where), "'answers.text'", where)
    starts = _list(_get(answers, "answer_start", where), "'answers.answer_start'", where)
    if len(texts) != len(starts):
        raise UserError(f"'answers' has {len(texts)} texts and {len(starts)} starts", where, FIX)
    pairs = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    return [_annotation(pair, where) for pair in pairs if not _is_none(pair)]


def _is_none(answer: Any, impossible: bool = False) -> bool:
    """Return whether an annotation says that there is no answer: without text, at -1 or nowhere.

    Args:
        impossible: the question is marked as unanswerable; then any start will do.
    """
    if not isinstance(answer, dict) or answer.get("text") not in ("", None):
        return False
    return impossible or answer.get("answer_start", -1) in (-1, None)


def _annotation(answer: Any, where: str) -> tuple[int, str]:
    start = _get(answer, "answer_start", where)
    if isinstance(start, float) and start.is_integer():
        start = int(start)
    if isinstance(start, bool) or not isinstance(start, int):
        raise UserError(f"'answer_start' is {json_type(start)}, not a whole number", where, FIX)
    return start, full_text(_get(answer, "text", where), "an answer's 'text'", where)


def _question(
    where: str, name: str, context: str, question: Any, answers: list[tuple[int, str]]
) -> Question:
    for start, text in answers:
        _check_answer(context, start, text, where)
    return Question(where, name, context, full_text(question, "'question'", where), answers)


def _check_answer(context: str, start: int, text: str, where: str) -> None:
    if start >= 0 and context.startswith(text, start):
        return
    found = context[start : start + len(text)] if 0 <= start < len(context) else None
    there = f"{shown(found)} there" if found is not None else f"{len(context)} characters"
    raise UserError(
        f"answer {shown(text)} does not stand at answer_start = {start}; the context has {there}",
        where,
        f"{_advice(context, start, text)}, {SKIP}",
    )


def _advice(context: str, start: int, text: str) -> str:
    """The offset that was probably meant."""
    encoded = context.encode()
    if start >= 0 and encoded.startswith(text.encode(), start):
        right = len(encoded[:start].decode())
        return f"answer_start counts characters, not bytes: it stands at {right}"
    places = _occurrences(context, text)
    if places:
        nearest = min(places, key=lambda place: abs(place - start))
        return f"It stands at {nearest}, {abs(nearest - start)} off: try answer_start={nearest}"
    if _occurrences(context.lower(), text.lower()):
        return "It is there in another case only: an answer must be an exact piece of the context"
    return "It is nowhere in the context: an answer must be an exact piece of it"


def _occurrences(context: str, text: str) -> list[int]:
    places, at = [], context.find(text)
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    return places


_REQUIRED = object()


def _get(entry: Any, key: str, where: str, default: Any = _REQUIRED) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"where an object with '{key}' should be is {json_type(entry)}", where, FIX)
    if key not in entry and default is _REQUIRED:
        present = ", ".join(f"'{name}'" for name in list(entry)[:12]) or "nothing"
        raise UserError(f"'{key}' is missing; there is {present}", where, FIX)
    return entry.get(key, default)


def _list(value: Any, name: str, where: str) -> list:
    if not isinstance(value, list):
        raise UserError(f"{name} is {json_type(value)}, not an array", where, FIX)
    return value
