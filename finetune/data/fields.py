"""Helpers of all encoders: a batch of rows in one call, required text fields, lists in table cells, row weights.

Independent of file formats; `sources` finds fields, `formats` names JSON's types.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from finetune.data.columns import Column, Example
from finetune.data.formats import json_type
from finetune.data.sources import MISSING, field_error, get_field
from finetune.data.utf8 import FIX, SKIP
from finetune.errors import UserError

TEXT = Column("scalar", "uint64")
"""Column `text`: `text_hash` of what an example was made of, for rows that are held out and for duplicates."""
WHERE = Column("blob", "uint8")
"""Column `where`: file:line of an example's row."""


def text_hash(text: str) -> int:
    """Return 64 bits that are the same for the same text, on every machine."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def encode_texts(
    batch: list[tuple[str, dict]],
    read: Callable[[str, dict], tuple[list[str], Any] | None],
    tokenize: Callable[[list[str]], list[list[int]]],
    build: Callable[[str, list[list[int]], Any], list[Example]],
) -> list[list[Example] | UserError]:
    """Encode a batch of rows with one call of the tokenizer.

    Examples get the columns `text`, unless they have one, and `where`.

    Args:
        read: returns the texts of (place, record) and whatever else `build` needs; None leaves the
            row out.
        build: returns the examples of (place, the ids of each text, what `read` returned).

    Both may raise a UserError, which takes the row's place in the result.
    """
    results: list[list[Example] | UserError] = []
    readings = []
    for where, record in batch:
        try:
            reading = read(where, record)
        except UserError as error:
            results.append(error)
            continue
        if reading is not None:
            readings.append((len(results), where, *reading))
        results.append([])
    ids = iter(tokenize([text for _, _, texts, _ in readings for text in texts]))
    for at, where, texts, rest in readings:
        own = [next(ids) for _ in texts]
        try:
            examples = build(where, own, rest)
        except UserError as error:
            results[at] = error
            continue
        place = where.encode("utf-8", "backslashreplace")
        common = {"text": text_hash("\n".join(texts)), "where": place}
        results[at] = [common | example for example in examples]
    return results


def text_field(record: dict, field: str, where: str, option_key: str, blank: bool = False) -> str:
    """Return the field's text.

    Args:
        blank: accept a text that is empty or contains only white space.

    Raises:
        UserError: the field is absent, not a string, or blank.
    """
    value = get_field(record, field)
    if value is MISSING:
        raise field_error(record, field, where, option_key)
    return full_text(value, f"field '{field}'", where, blank)


def full_text(value: Any, name: str, where: str, blank: bool = False) -> str:
    """Return `value` if it is a string, and not blank; `name` is its name in error messages."""
    if not isinstance(value, str):
        raise UserError(f"{name} is {json_type(value)}, not a string", where, FIX)
    if not blank and not value.strip():
        raise UserError(f"{name} is empty", where, FIX)
    return value


def parsed_cell(value: Any) -> Any:
    """Parse an array or object from a string in JSON or Python syntax; return other values as is.

    CSV files and text columns of parquet files have no other way to store one; pandas writes lists
    in Python syntax.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value.strip())
            json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, (list, dict)):
            return parsed
    return value


def counts(
    record: dict, weight_field: str | None, others: Sequence[str | None], where: str
) -> bool:
    """Tell whether a row takes part, by its training weight: 1 takes part, 0 is left out.

    Args:
        weight_field: `task.weight_field`; rows without it, or with null or an empty cell, take
            part.
        others: fields that the task uses for other purposes.

    Raises:
        UserError: the weight is another number; losses are not weighted row by row.
    """
    if weight_field is None or weight_field in others:
        return True
    value = get_field(record, weight_field)
    try:
        weight = float(value) if isinstance(value, (bool, int, float, str)) else math.nan
    except (ValueError, OverflowError):  # text that is not a number is not a weight
        return True
    if math.isnan(weight) or weight == 1:
        return True
    if weight != 0:
        raise UserError(
            f"field '{weight_field}' is {value}: a row takes part (1) or is left out (0), losses "
            "are not weighed row by row",
            where,
            f"Write 0 or 1, or set task.weight_field=null if it is no training weight, {SKIP}",
        )
    return False


def shown(text: str, length: int = 40) -> str:
    """Shorten a text in its middle and quote it for an error message."""
    return repr(text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}")


def digest(*parts: Any) -> str:
    """Return a fingerprint of plain values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
