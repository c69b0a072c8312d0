"""What the encoders of all tasks share: a text field that must be there, and fingerprints.

Does not know any format; `records` finds fields, `rows` names JSON's types.
"""

from __future__ import annotations

import hashlib
from typing import Any

from finetune.data.records import MISSING, field_error, get_field
from finetune.data.rows import json_type
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


def shown(text: str, length: int = 40) -> str:
    """A text as error messages quote it, cut in its middle."""
    return repr(text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2:]}")


def digest(*parts: Any) -> str:
    """A fingerprint of plain values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
