"""Encoder of labelled texts: single label, multi-label and regression.

Flow: text (and pair) -> ids, a closing eos -> label by name (or as a number). Texts t, pairs p, eos E, newline n:

    single   t t t t E            pair   t t t n p p E
                     ^ pooled: it alone has read everything                ^

The eos is appended, and pooled by its position; its id is never looked for. Too long texts lose tokens, never the eos:
truncation head keeps t1 t2 t3 t4, head_tail t1 t2 t5 t6; of a pair the longer text gives first. The encoder knows
label names once the task has learnt them; before, every name is taken as it comes.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Union, cast

from finetune.config import ClassifyConfig
from finetune.data.columns import Column, Example
from finetune.data.fields import MEND, digest, shown, text_field
from finetune.data.records import MISSING, field_error, get_field
from finetune.data.rows import json_type
from finetune.data.text import TextTokenizer, ids_dtype
from finetune.data.utf8 import SKIP
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = Union[str, float]
"""A name, a JSON array of names (multi-label), or a number (regression)."""
SEPARATOR = "\n"
"""Between the texts of a pair."""

FLOAT32_MAX = 3.4028234663852886e38
"""Regression targets are fp32."""


class ClassifyEncoder:
    """Rows -> columns `ids`, `label` (category, or number), `where` (file:line) and `cut` (tokens lost).

    Args:
        names: label names in the order of the head's outputs, or None while they are not known.
        by_index: integer labels count in `names`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: ClassifyConfig, names: list[str] | None,
                 by_index: bool):
        self.cfg, self.labels = cfg, LabelReader(cfg, names, by_index)
        label = Column("scalar", "float64") if cfg.problem == "regression" else Column("category", "int32")
        self.columns = {"ids": Column("token", ids_dtype(tokenizer)), "label": label, "where": Column("blob", "uint8"),
                        "cut": Column("scalar", "int32")}
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)
        self._separator = self._texts([SEPARATOR])[0]

    def fingerprint(self) -> str:
        cfg = self.cfg
        return digest("classify-2", self._texts.fingerprint, self.labels.names, self.labels.by_index, cfg.text_field,
                      cfg.text_pair_field, cfg.label_field, cfg.problem, cfg.truncation, cfg.max_length)

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        rows = [self._row(where, record) for where, record in batch]
        ids = iter(self._texts([text for row in rows if not isinstance(row, UserError) for text in row[0]]))
        results: list[list[Example] | UserError] = []
        for (where, _), row in zip(batch, rows, strict=True):
            if isinstance(row, UserError):
                results.append(row)
            else:
                kept, cut = self._join([next(ids) for _ in row[0]])
                results.append([{"ids": kept, "label": row[1], "where": where.encode("utf-8", "backslashreplace"), "cut": cut}])
        return results

    def _row(self, where: str, record: dict) -> tuple[list[str], Label] | UserError:
        try:
            texts = [text_field(record, self.cfg.text_field, where, "task.text_field")]
            if self.cfg.text_pair_field:
                texts.append(text_field(record, self.cfg.text_pair_field, where, "task.text_pair_field"))
            return texts, self.labels.read(record, where)
        except UserError as error:
            return error

    def _join(self, parts: list[list[int]]) -> tuple[list[int], int]:
        """Ids of one or two texts with eos, at most `max_length`, and how many were cut."""
        glue = self._separator if len(parts) == 2 else []
        room = self.cfg.max_length - 1 - len(glue)
        kept = [cut_text(ids, n, self.cfg.truncation) for ids, n in zip(parts, shares(parts, room), strict=True)]
        lost = sum(map(len, parts)) - sum(map(len, kept))
        joined = kept[0] if len(kept) == 1 else [*kept[0], *glue, *kept[1]]
        return [*joined, self._eos], lost


def shares(parts: list[list[int]], room: int) -> list[int]:
    """Tokens that each text may keep: the longer one gives first."""
    lengths = [len(ids) for ids in parts]
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(length, room) for length in lengths]
    half = min(min(lengths), room // 2)
    first_is_shorter = lengths[0] <= lengths[1]
    return [half, room - half] if first_is_shorter else [room - half, half]


def cut_text(ids: list[int], room: int, truncation: str) -> list[int]:
    """The head, or the head and the tail (the head one token longer where `room` is odd)."""
    if len(ids) <= room:
        return ids
    tail = room // 2 if truncation == "head_tail" else 0
    return ids[: room - tail] + ids[len(ids) - tail:]


class LabelReader:
    """Field -> label of the configured problem, or what is wrong with it."""

    def __init__(self, cfg: ClassifyConfig, names: list[str] | None, by_index: bool):
        self.field, self.problem, self.names, self.by_index = cfg.label_field, cfg.problem, names, by_index
        self.counted = by_index and not any(_is_integer(name) for name in names or [])  # else an integer is a name
        self._texts = (cfg.text_field, cfg.text_pair_field)

    def read(self, record: dict, where: str) -> Label:
        value = get_field(record, self.field)
        if value is MISSING:
            raise self._missing(record, where)
        match self.problem:
            case "single_label":
                return self._single(value, where)
            case "multi_label":
                return self._multi(value, where)
            case _:
                return self._number(value, where)

    def _single(self, value: Any, where: str) -> str:
        if isinstance(value, list):
            raise self._wrong_type(value, "a name or an integer", where, "Try task.problem=multi_label.")
        if isinstance(value, float) and not value.is_integer():
            raise self._wrong_type(value, "a name or an integer", where, "Try task.problem=regression.")
        return self._known(value, where)

    def _multi(self, value: Any, where: str) -> str:
        value = _array(value)
        if not isinstance(value, list):
            raise self._wrong_type(value, "an array of labels", where, "Try task.problem=single_label.")
        names = sorted(self._known(item, where) for item in value)
        twice = next((a for a, b in pairwise(names) if a == b), None)
        if twice is not None:
            raise UserError(f"field '{self.field}' names label '{twice}' twice", where,
                            f"List the labels that apply, not zeros and ones for all of them; {SKIP}")
        return json.dumps(names, ensure_ascii=False)

    def _number(self, value: Any, where: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            remedy = MEND if isinstance(value, str) and not value.strip() else "Try task.problem=single_label."
            raise self._wrong_type(value, "a number", where, remedy) from None
        if not abs(number) <= FLOAT32_MAX:
            raise self._wrong_type(value, "a finite number", where, MEND)
        return number

    def _known(self, value: Any, where: str) -> str:
        """The label's name, if it is one of the known."""
        name = self._name(value, where)
        if self.names is None or name in self.names:
            return name
        place = {"false": "0", "true": "1"}.get(name, name) if isinstance(value, bool) else name
        if self.counted and place.isdecimal() and int(place) < len(self.names):
            return self.names[int(place)]
        raise unseen(name, self.names, self.by_index, where)

    def _name(self, value: Any, where: str) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if not isinstance(value, (int, str)):
            raise self._wrong_type(value, "a name or an integer", where, MEND)
        name = str(value).strip()
        if not name:
            raise UserError(f"field '{self.field}' is an empty label", where, MEND)
        return name

    def _missing(self, record: dict, where: str) -> UserError:
        """The remedy proposes no field that is a text already."""
        others = {name: value for name, value in record.items() if name not in self._texts}
        remedy = field_error(others, self.field, where, "task.label_field").remedy
        return UserError(field_error(record, self.field, where, "task.label_field").problem, where, remedy)

    def _wrong_type(self, value: Any, wanted: str, where: str, remedy: str) -> UserError:
        quoted = f" {shown(str(value))}" if isinstance(value, (str, float, int)) else ""
        return UserError(f"field '{self.field}' is {json_type(value)}{quoted}, not {wanted}", where, remedy)


def _array(value: Any) -> Any:
    """A JSON array that stands in a string, as CSV files have it, else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def unseen(name: str, names: list[str], by_index: bool, where: str) -> UserError:
    """The label is none of those that the head has outputs for."""
    known = ", ".join(f"'{n}'" for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    origin = "task.labels has" if by_index else "the training data have"
    return UserError(f"label '{name}' is unknown: {origin} {known}", where,
                     f"Mend the row, or name all labels: task.labels=[...]; {SKIP}")


def sort_names(names: list[str]) -> list[str]:
    """Integers by value, other names by spelling."""
    if all(map(_is_integer, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
