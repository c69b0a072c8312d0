"""Encoder of labelled texts: single label, multi-label and regression.

Flow: text (and pair) -> ids, a closing eos -> label by name (or as a number). With text tokens t,
pair tokens p, eos E and newline n:

    single   t t t t E            pair   t t t n p p E
                     ^ pooled: sees the whole text   ^

The eos is appended, and pooled by its position; its id is never searched for. Texts that are too
long lose tokens, never the eos: truncation head keeps t1 t2 t3 t4, head_tail t1 t2 t5 t6; of a pair
the longer text loses tokens first.

The encoder knows label names once the task has collected them; before that, every name is accepted.
A row's label is matched by its spelling, then by its meaning (`True` is `true`, `1.0` is `1`), and
only then, if names were configured, as a position among them. A label that matches two of the names
is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Union, cast

from finetune.config import ClassifyConfig
from finetune.data.columns import Column, Example
from finetune.data.fields import (
    TEXT,
    WHERE,
    counts,
    digest,
    encode_texts,
    parsed_cell,
    shown,
    text_field,
)
from finetune.data.formats import json_type
from finetune.data.sources import MISSING, field_error, get_field
from finetune.data.tokenizer import TextTokenizer, ids_dtype
from finetune.data.utf8 import FIX, SKIP
from finetune.errors import UserError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = Union[str, float]
"""A name, a JSON array of names (multi-label), or a number (regression)."""
SEPARATOR = "\n"
"""Between the texts of a pair."""

LAST_TOKEN = "the last token that is not padding"
"""Pooling of plain transformers, named in the description of a checkpoint that was not trained here."""

FLOAT32_MAX = 3.4028234663852886e38
"""Regression targets are fp32."""
SEPARATORS = {"comma": ",", "semicolon": ";", "pipe": "|", "space": " ", "tab": "\t"}
"""Words for `task.label_separator`, which need no quotes on a command line."""
TRUTHS = ({"false": False, "true": True}, {"no": False, "yes": True}, {"0": False, "1": True})
"""Pairs of names that say the same thing."""


class ClassifyEncoder:
    """Encoder of rows to the columns `ids`, `label`, `where`, `cut` and `text`.

    `label` is a category or a number, `where` is file:line, and `cut` counts the tokens lost.

    Args:
        names: label names in the order of the head's outputs, or None while they are not known.
        by_index: integer labels are positions in `names`.
        plain: encode texts as plain transformers does (`PlainText`), not as drawn above; None: as
            drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cfg: ClassifyConfig,
        names: list[str] | None,
        by_index: bool,
        plain: PlainText | None = None,
    ):
        self.cfg, self.labels = cfg, LabelReader(cfg, names, by_index)
        number, name = Column("scalar", "float64"), Column("category", "int32")
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "label": number if cfg.problem == "regression" else name,
            "where": WHERE,
            "cut": Column("scalar", "int32"),
            "text": TEXT,
        }
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)
        self._separator = self._texts([SEPARATOR])[0]
        self._plain = plain
        self._tokenize: Callable[[list[str]], list] = list if plain else self._texts

    def fingerprint(self) -> str:
        cfg = self.cfg
        return digest(
            "classify-3",
            self._texts.fingerprint,
            self.labels.names,
            self.labels.by_index,
            cfg.text_field,
            cfg.text_pair_field,
            cfg.label_field,
            cfg.label_separator,
            cfg.weight_field,
            cfg.problem,
            cfg.truncation,
            cfg.max_length,
            *([self._plain.pad] if self._plain else []),
        )

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        return encode_texts(batch, self._read, self._tokenize, self._examples)

    def text_ids(self, texts: list[list[str]]) -> list[tuple[list[int], int]]:
        """Return the ids and the number of tokens cut, for each single text or pair.

        The last id is the pooled one.
        """
        ids = iter(self._tokenize([part for parts in texts for part in parts]))
        return [self._join([next(ids) for _ in parts]) for parts in texts]

    def _read(self, where: str, record: dict) -> tuple[list[str], Label] | None:
        """Return a row's texts and label, or None if its weight leaves it out."""
        cfg = self.cfg
        others = (cfg.text_field, cfg.text_pair_field, cfg.label_field)
        if not counts(record, cfg.weight_field, others, where):
            return None
        return labelled_texts(record, cfg, where), self.labels.read(record, where)

    def _examples(self, where: str, parts: list, label: Label) -> list[Example]:
        """Build the example of a row from what `_tokenize` made of its texts."""
        ids, cut = self._join(parts)
        if not ids:
            raise UserError("the text is empty: there is no token to judge", where, FIX)
        return [{"ids": ids, "label": label, "cut": cut}]

    def _join(self, parts: list) -> tuple[list[int], int]:
        """Return at most `max_length` ids of one or two texts with eos, and how many were cut.

        Args:
            parts: what `_tokenize` made of the texts: their ids, or the texts themselves.
        """
        if self._plain:
            return self._plain.ids(parts, self.cfg.max_length)
        glue = self._separator if len(parts) == 2 else []
        room = self.cfg.max_length - 1 - len(glue)
        kept = [
            cut_text(ids, n, self.cfg.truncation)
            for ids, n in zip(parts, shares(parts, room), strict=True)
        ]
        lost = sum(map(len, parts)) - sum(map(len, kept))
        joined = kept[0] if len(kept) == 1 else [*kept[0], *glue, *kept[1]]
        return [*joined, self._eos], lost


def labelled_texts(record: dict, cfg: ClassifyConfig, where: str) -> list[str]:
    """Return the text of a row, or its two texts.

    Raises:
        UserError: a text is absent, not a string, or blank.
    """
    texts = [text_field(record, cfg.text_field, where, "task.text_field")]
    if cfg.text_pair_field:
        texts.append(text_field(record, cfg.text_pair_field, where, "task.text_pair_field"))
    return texts


class PlainText:
    """Encoder of texts as in plain transformers: only the tokenizer's own special tokens are added.

    The last token that is not `pad` is pooled, wherever the tokenizer puts it
    (GenericForSequenceClassification in transformers/modeling_layers.py). It cannot see the tokens
    after it, so these are left out:

        t t t t P P  ->  t t t t          pad = P

    Args:
        pad: pad_token_id of the model's config.json; None: the last token is pooled, whatever it
            is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad: int | None):
        self.tokenizer, self.pad = tokenizer, pad

    def ids(self, texts: list[str], max_length: int) -> tuple[list[int], int]:
        """Return the ids of one text or of a pair, and how many tokens were cut."""
        whole = self.tokenizer(*texts)["input_ids"]
        ids = whole
        if len(whole) > max_length:
            ids = self.tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
        cut = len(whole) - len(ids)
        if self.pad is not None and ids:
            last = max((place for place, token in enumerate(ids) if token != self.pad), default=0)
            ids = ids[: last + 1]
        return list(ids), cut


def shares(parts: list[list[int]], room: int) -> list[int]:
    """Return how many tokens each text may keep; the longer one loses tokens first."""
    lengths = [len(ids) for ids in parts]
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(length, room) for length in lengths]
    half = min(min(lengths), room // 2)
    first_is_shorter = lengths[0] <= lengths[1]
    return [half, room - half] if first_is_shorter else [room - half, half]


def cut_text(ids: list[int], room: int, truncation: str) -> list[int]:
    """Return the head, or head and tail (the head is one token longer if `room` is odd)."""
    if len(ids) <= room:
        return ids
    tail = room // 2 if truncation == "head_tail" else 0
    return ids[: room - tail] + ids[len(ids) - tail :]


class LabelReader:
    """Reader of a field as a label of the configured problem; reports fields that are not valid."""

    def __init__(self, cfg: ClassifyConfig, names: list[str] | None, by_index: bool):
        self.cfg, self.names, self.by_index = cfg, names, by_index
        keys = [label_key(name) for name in names or []]
        self.counted = by_index and not any(map(_is_integer, keys))  # else an integer is a name
        self._truth = next((truth for truth in TRUTHS if sorted(truth) == sorted(keys)), None)

    def read(self, record: dict, where: str) -> Label:
        """Return the label of a row.

        Raises:
            UserError: it is missing, of a wrong type, or none of the known names.
        """
        cfg = self.cfg
        value = get_field(record, cfg.label_field)
        if value is MISSING:
            error = field_error(record, cfg.label_field, where, "task.label_field")
            # The remedy suggests no field that is used as a text.
            texts = (cfg.text_field, cfg.text_pair_field)
            others = {name: value for name, value in record.items() if name not in texts}
            remedy = field_error(others, cfg.label_field, where, "task.label_field").remedy
            raise UserError(error.problem, where, remedy)
        if cfg.problem == "regression":
            return self._number(value, where)
        if cfg.problem == "multi_label":
            return self._multi(value, where)
        other = None
        if isinstance(value, list):
            other = "multi_label"
        elif isinstance(value, float) and not value.is_integer():
            other = "regression"
        if other:
            remedy = f"Try task.problem={other}."
            raise self._wrong_type(value, "a name or an integer", where, remedy)
        return self._known(value, where)

    def _multi(self, value: Any, where: str) -> str:
        """Return the labels of a cell as a JSON array of names, sorted."""
        field = self.cfg.label_field
        separator = SEPARATORS.get(self.cfg.label_separator or "", self.cfg.label_separator)
        value = parsed_cell(value)
        if isinstance(value, str) and separator:
            value = [part.strip() for part in value.split(separator)] if value.strip() else []
            value = [part for part in value if part] if separator.isspace() else value
        if not isinstance(value, list):
            mark = next((word for word, mark in SEPARATORS.items() if mark in str(value)), "comma")
            remedy = "Try task.problem=single_label, or for cells such as 'a,b' "
            raise self._wrong_type(
                value, "an array of labels", where, f"{remedy}task.label_separator={mark}."
            )

        # [1.0, 0.0] is no list of names. [1, 0] could be one, but not if there are two names and it
        # has one number for each. More than two zeros and ones name a label twice.
        if value and all(isinstance(v, (bool, int, float)) and v in (0, 1) for v in value):
            whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
            if not whole or (self.counted and len(value) == len(self.names or [])):
                raise UserError(
                    f"field '{field}' is {shown(json.dumps(value))[1:-1]}: zeros and ones, not "
                    "labels",
                    where,
                    NO_ZEROS_AND_ONES,
                )
        names = sorted(self._known(item, where) for item in value)
        twice = next((a for a, b in pairwise(names) if a == b), None)
        if twice is not None:
            raise UserError(
                f"field '{field}' names label '{twice}' twice", where, NO_ZEROS_AND_ONES
            )
        return json.dumps(names, ensure_ascii=False)

    def _number(self, value: Any, where: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            blank = isinstance(value, str) and not value.strip()
            remedy = FIX if blank else "Try task.problem=single_label."
            raise self._wrong_type(value, "a number", where, remedy) from None
        if not abs(number) <= FLOAT32_MAX:
            raise self._wrong_type(value, "a finite number", where, FIX)
        return number

    def _known(self, value: Any, where: str) -> str:
        """Return the known label name that matches by spelling, meaning or position, in this order.

        Raises:
            UserError: the value matches none of the names, or two of them.
        """
        name = self._name(value, where)
        if self.names is None or name in self.names:
            return name
        key = label_key(name)
        alike = [other for other in self.names if label_key(other) == key]
        counted = self.counted and key.isdecimal() and int(key) < len(self.names)
        place = self.names[int(key)] if counted else None
        truth = next((pair[key] for pair in TRUTHS if key in pair), None)
        if not alike and self._truth and truth is not None:
            alike = [other for other in self.names if self._truth[label_key(other)] is truth]
            if place and place not in alike and "yes" in self._truth:
                alike = [place]  # integers are positions in [yes, no] as in any list
            elif place and place not in alike:
                raise UserError(
                    f"label {name} could be '{alike[0]}' by its meaning and '{place}' by its place "
                    f"in task.labels",
                    where,
                    "Try task.labels=[false,true], or write true and false.",
                )
        if len(alike) > 1:
            raise UserError(
                f"label '{name}' could be {_quoted(alike)}",
                where,
                f"Spell it as one of them, {SKIP}",
            )
        if not alike and isinstance(value, bool) and self.by_index:
            raise UserError(
                f"label {name} is a boolean, and none of task.labels = {_quoted(self.names)} says "
                "which of them it is",
                where,
                "Try task.labels=[false,true], or write the names into the data.",
            )
        if not alike and place is None:
            raise unseen(name, self.names, self.by_index, where)
        return alike[0] if alike else cast(str, place)

    def _name(self, value: Any, where: str) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if not isinstance(value, (int, str)):
            raise self._wrong_type(value, "a name or an integer", where, FIX)
        name = str(value).strip()
        if not name:
            raise UserError(f"field '{self.cfg.label_field}' is an empty label", where, FIX)
        return name

    def _wrong_type(self, value: Any, wanted: str, where: str, remedy: str) -> UserError:
        quoted = f" {shown(str(value))}" if isinstance(value, (str, float, int)) else ""
        return UserError(
            f"field '{self.cfg.label_field}' is {json_type(value)}{quoted}, not {wanted}",
            where,
            remedy,
        )


NO_ZEROS_AND_ONES = f"List the labels that apply, not zeros and ones for all of them, {SKIP}"


def label_key(name: str) -> str:
    """Normalise a label's spelling: `True` and `true` are one label, and so are `1.0` and `1`."""
    plain = name.strip().casefold()
    whole = re.fullmatch(r"(-?\d+)\.0+", plain)
    return whole[1] if whole else plain


def refuse_double_spellings(names: list[str], label_field: str) -> None:
    """Check that names collected from data differ in more than their spelling.

    Raises:
        UserError: there is `Positive` beside `positive`, or `1` beside `1.0`.
    """
    for _, same in groupby(sorted(names, key=label_key), key=label_key):
        spellings = sorted(same)
        if len(spellings) > 1:
            raise UserError(
                f"labels {_quoted(spellings)} differ in their spelling alone: are they one label?",
                setting("task.label_field", label_field),
                "Spell them alike in the data; if they differ, name all labels: task.labels=[...]",
            )


def _quoted(names: list[str]) -> str:
    """Return the first names as a list for messages."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(f"'{name}'" for name in names[:8]) + more


def unseen(name: str, names: list[str], by_index: bool, where: str) -> UserError:
    """Return the error for a label that the head has no output for."""
    origin = "task.labels has" if by_index else "the training data have"
    return UserError(
        f"label '{name}' is unknown: {origin} {_quoted(names)}",
        where,
        f"Fix the row, or name all labels: task.labels=[...], {SKIP}",
    )


def sort_names(names: list[str]) -> list[str]:
    """Sort names, integers by value and others by spelling."""
    if all(map(_is_integer, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
