"""What the encoders of all tasks share: a text field that must be there, lists in table cells, row weights, fingerprints.

Does not know any format; `sources` finds fields, `formats` names JSON's types.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from finetune.data.formats import json_type
from finetune.data.sources import MISSING, field_error, get_field
from finetune.data.utf8 import SKIP
from finetune.errors import UserError

MEND = f"Mend the row; {SKIP}"


def text_field(record: dict, field: str, where: str, option_key: str) -> str:
    """The field's text.

    Raises:
        UserError: it is absent, no string, or holds nothing but white space.
    """
    value = get_field(record, field)
    if value is MISSING:
        raise field_error(record, field, where, option_key)
    return full_text(value, f"field '{field}'", where)


def full_text(value: Any, name: str, where: str) -> str:
    """`value`, if it is a string with more than white space; `name` is what an error calls it."""
    if not isinstance(value, str):
        raise UserError(f"{name} is {json_type(value)}, not a string", where, MEND)
    if not value.strip():
        raise UserError(f"{name} is empty", where, MEND)
    return value


def parsed_cell(value: Any) -> Any:
    """The array or object that a string holds as JSON or as Python writes it; any other value as it is.

    CSV files and text columns of parquet files have no other way to hold one; pandas writes lists as Python does.
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
    """Tell whether a row takes part, by the training weight that it may carry: 1 does, 0 is left out.

    Args:
        weight_field: `task.weight_field`; rows without it, or with null or an empty cell, take part.
        others: fields that the task reads as something else.

    Raises:
        UserError: the weight is another number; losses are not weighed row by row.
    """
    if weight_field is None or weight_field in others:
        return True
    value = get_field(record, weight_field)
    try:
        weight = float(value) if isinstance(value, (bool, int, float, str)) else math.nan
    except (ValueError, OverflowError):  # a text is no weight
        return True
    if math.isnan(weight) or weight == 1:
        return True
    if weight != 0:
        raise UserError(
            f"field '{weight_field}' is {value}: a row takes part (1) or is left out (0), losses are not "
            "weighed row by row",
            where,
            f"Write 0 or 1, or set task.weight_field=null if it is no training weight; {SKIP}",
        )
    return False


def shown(text: str, length: int = 40) -> str:
    """A text as error messages quote it, cut in its middle."""
    return repr(text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}")


def digest(*parts: Any) -> str:
    """A fingerprint of plain values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
