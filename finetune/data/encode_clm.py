"""Encoder of plain documents for causal language modelling.

Flow: record -> text field -> GPT-2 BPE ids -> ids + eos, as one example per document. Cuts nothing
(`packing` does) and adds no bos. Strings such as "<|endoftext|>" inside a document become the
special id, as in GPT-2's own convention: data that must not end documents has to be cleaned before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from finetune.data.columns import Column, Example
from finetune.data.fields import counts
from finetune.data.formats import json_type
from finetune.data.sources import MISSING, field_error, get_field
from finetune.data.tokenizer import backend, tokenizer_fingerprint
from finetune.data.utf8 import FIX
from finetune.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PIECE_CHARACTERS = 1 << 15
GROUP_CHARACTERS = 4 << 20
CACHED_WORDS = 200_000
# A space or newline behind a letter or digit starts a new word of GPT-2's pattern, whatever stands
# before or after.
WORD_END = re.compile(r"[^\W_](?=[ \n])")


class TextEncoder:
    """Encode documents to the columns `ids` (with a closing eos) and `subset`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_field: str,
        subset_field: str | None,
        weight_field: str | None = None,
    ):
        self.text_field, self.subset_field, self.weight_field = (
            text_field,
            subset_field,
            weight_field,
        )
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "subset": Column("category", "int32"),
        }
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        parts = [
            "clm-2",
            self._texts.fingerprint,
            self.text_field,
            self.subset_field,
            self.weight_field,
        ]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        texts = [self._text(where, record) for where, record in batch]
        ids = iter(self._texts([text for text in texts if isinstance(text, str) and text]))
        results: list[list[Example] | UserError] = []
        for (_, record), text in zip(batch, texts, strict=True):
            if isinstance(text, UserError):
                results.append(text)
            else:
                results.append([self._example(next(ids), record)] if text else [])
        return results

    def _example(self, ids: list[int], record: dict) -> Example:
        ids.append(self._eos)
        return {"ids": ids, "subset": self._subset(record)}

    def _text(self, where: str, record: dict) -> str | UserError:
        """Return the document; "" if its weight leaves it out."""
        try:
            if not counts(record, self.weight_field, (self.text_field, self.subset_field), where):
                return ""
        except UserError as error:
            return error
        text = get_field(record, self.text_field)
        if text is MISSING:
            return field_error(record, self.text_field, where, "task.text_field")
        if not isinstance(text, str):
            return UserError(
                f"field '{self.text_field}' is {json_type(text)}, not a string",
                where,
                FIX,
            )
        return text

    def _subset(self, record: dict) -> str:
        value = get_field(record, self.subset_field) if self.subset_field else MISSING
        return "" if value is MISSING or value is None else str(value)


class TextTokenizer:
    """Encode texts to ids with the tokenizer's own threads, also within one long text.

    Special tokens are not added.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    @cached_property
    def _backend(self) -> Tokenizer:
        """A copy of the backend tokenizer, made on first use.

        Truncation and padding that others set on the original would silently cut documents.
        """
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(backend(self._tokenizer).to_str())
        copy.no_truncation()
        copy.no_padding()
        # BPE caches the first 10000 words it meets and none after them. A cache of 200000 saves a
        # fifth of the time on English. The method is private, hence optional: without it the ids
        # are the same.
        if hasattr(copy.model, "_resize_cache"):
            copy.model._resize_cache(CACHED_WORDS)
        return copy

    @cached_property
    def _divisible(self) -> bool:
        return _splits_at_spaces(self._backend)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if not self._divisible or max(map(len, texts), default=0) <= PIECE_CHARACTERS:
            return self._encode(texts)
        results: list[list[int]] = [[] for _ in texts]
        pieces = ((i, piece) for i, text in enumerate(texts) for piece in _pieces(text))
        for group in _groups(pieces):
            encoded = self._encode([piece for _, piece in group])
            for (i, _), ids in zip(group, encoded, strict=True):
                results[i] += ids
        return results

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) characters of every token of one text; the end is exclusive."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]


def ids_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the smallest type that holds every id; GPT-J's 50400 fit 16 bits."""
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


def _splits_at_spaces(model: Any) -> bool:
    """Tell whether a text may be cut before a space without changing its ids.

    This holds for GPT-2's byte-level pattern without normalisation.
    """
    split, added = model.pre_tokenizer, model.get_added_tokens_decoder().values()
    return (
        type(split).__name__ == "ByteLevel"
        and model.normalizer is None
        and not split.add_prefix_space
        and split.use_regex
        and not any(t.lstrip or t.rstrip or " " in t.content or "\n" in t.content for t in added)
    )


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text before spaces.

    Threads can then share it, and its encoding does not hold all of it at once.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        found = WORD_END.search(text, start + PIECE_CHARACTERS)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _groups(pieces: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    while group := list(islice(pieces, GROUP_CHARACTERS // PIECE_CHARACTERS)):
        yield group
