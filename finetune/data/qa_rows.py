"""Rows of question answering data to questions, every answer checked against its context.

    article    {"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
               "is_impossible"}]}]}                                SQuAD v1.1 and v2: the elements of the file's "data"
    flat       {"id", "context", "question", "answers": {"text": [..], "answer_start": [..]}}      as on the hub

`answer_start` counts characters of the context. A question without answers is unanswerable; some exports write
{"text": "", "answer_start": -1} instead. Tokenises nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union

from finetune.data.fields import full_text, parsed_cell, shown
from finetune.data.formats import first_names, json_type
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
    """Yield the row's questions; of an article the good ones too when others are bad."""
    try:
        if "paragraphs" in record:
            yield from _article(record, where)
        elif "question" in record or "context" in record:
            yield _flat(record, where)
        else:
            present = first_names(record) or "no field at all"
            raise UserError(
                f"the row is neither an article nor a question; it has {present}",
                where,
                f"{LAYOUTS}, {SKIP}",
            )
    except UserError as error:
        yield error


def without_answers(record: dict) -> dict:
    """Return the record as a model is asked: without answers, whatever it has or lacks."""
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
            try:
                yield _of_article(entry, context, place, j)
            except UserError as error:
                yield error


def _of_article(entry: Any, context: str, place: str, number: int) -> Question:
    name = _get(entry, "id", f"{place} question {number}", default=f"question {number}")
    where = f"{place} id {name}"
    impossible = entry.get("is_impossible")
    annotated = (
        [] if impossible is True and "answers" not in entry else _get(entry, "answers", where)
    )
    answers = _annotations(_list(annotated, "'answers'", where), where, impossible is True)
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


def _flat(record: dict, where: str) -> Question:
    name = record.get("id")
    place = f"{where} id {name}" if name is not None else where
    context = full_text(_get(record, "context", place), "'context'", place)
    answers = parsed_cell(_get(record, "answers", place))
    if not isinstance(answers, (list, dict)):
        raise UserError(
            f"'answers' is {json_type(answers)}, not an object",
            place,
            f'Write it as {{"text": ["Paris"], "answer_start": [17]}}, empty lists for no answer, '
            f"{SKIP}",
        )
    if isinstance(answers, dict):  # texts and starts are two lists
        texts = _list(_get(answers, "text", place), "'answers.text'", place)
        starts = _list(_get(answers, "answer_start", place), "'answers.answer_start'", place)
        if len(texts) != len(starts):
            problem = f"'answers' has {len(texts)} texts and {len(starts)} starts"
            raise UserError(problem, place, FIX)
        pairs = zip(texts, starts, strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
    annotations = _annotations(answers, place)
    identity = str(where if name is None else name)
    return _question(place, identity, context, _get(record, "question", place), annotations)


def _annotations(answers: list, where: str, impossible: bool = False) -> list[tuple[int, str]]:
    """Return (first character, text) of the answers, without those that say that there is none.

    Such an answer has no text and stands at -1 or nowhere.

    Args:
        impossible: the question is marked as unanswerable; then any start will do.
    """
    annotations = []
    for answer in answers:
        if (
            isinstance(answer, dict)
            and answer.get("text") in ("", None)
            and (impossible or answer.get("answer_start", -1) in (-1, None))
        ):
            continue
        start = _get(answer, "answer_start", where)
        if isinstance(start, float) and start.is_integer():
            start = int(start)
        if isinstance(start, bool) or not isinstance(start, int):
            problem = f"'answer_start' is {json_type(start)}, not a whole number"
            raise UserError(problem, where, FIX)
        annotations.append(
            (start, full_text(_get(answer, "text", where), "an answer's 'text'", where))
        )
    return annotations


def _question(
    where: str, name: str, context: str, question: Any, answers: list[tuple[int, str]]
) -> Question:
    """Build a question, each of whose answers stands where it says.

    Raises:
        UserError: an answer does not; the remedy names the offset that was probably meant.
    """
    for start, text in answers:
        if start >= 0 and context.startswith(text, start):
            continue
        there = f"{len(context)} characters"
        if 0 <= start < len(context):
            there = f"{shown(context[start : start + len(text)])} there"
        encoded = context.encode()
        places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
        if start >= 0 and encoded.startswith(text.encode(), start):
            right = len(encoded[:start].decode())
            advice = f"answer_start counts characters, not bytes: it stands at {right}"
        elif places:
            nearest = min(places, key=lambda place: abs(place - start))
            off = abs(nearest - start)
            advice = f"It stands at {nearest}, {off} off: try answer_start={nearest}"
        elif text.lower() in context.lower():
            advice = (
                "It is there in another case only: an answer must be an exact piece of the context"
            )
        else:
            advice = "It is nowhere in the context: an answer must be an exact piece of it"
        raise UserError(
            f"answer {shown(text)} does not stand at answer_start = {start}; the context has "
            f"{there}",
            where,
            f"{advice}, {SKIP}",
        )
    return Question(where, name, context, full_text(question, "'question'", where), answers)


_REQUIRED = object()


def _get(entry: Any, key: str, where: str, default: Any = _REQUIRED) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"where an object with '{key}' should be is {json_type(entry)}", where, FIX)
    if key not in entry and default is _REQUIRED:
        present = first_names(entry) or "nothing"
        raise UserError(f"'{key}' is missing; there is {present}", where, FIX)
    return entry.get(key, default)


def _list(value: Any, name: str, where: str) -> list:
    if not isinstance(value, list):
        raise UserError(f"{name} is {json_type(value)}, not an array", where, FIX)
    return value
