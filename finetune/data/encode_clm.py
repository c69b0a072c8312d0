"""Encoder of plain documents for causal language modelling.

Flow: record -> text field -> GPT-2 BPE ids -> ids + eos, as one example per document. Cuts nothing
(`packing` does) and adds no bos. Strings such as "<|endoftext|>" inside a document become the
special id, as in GPT-2's own convention: data that must not end documents has to be cleaned before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from finetune.data.columns import Column, Example
from finetune.data.fields import TEXT, counts, digest, encode_texts, text_field
from finetune.data.sources import MISSING, get_field
from finetune.data.tokenizer import TextTokenizer, ids_dtype
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEncoder:
    """Encode documents to the columns `ids` (with a closing eos), `subset` and `text`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_field: str,
        subset_field: str | None,
        weight_field: str | None = None,
    ):
        self.text_field, self.subset_field = text_field, subset_field
        self.weight_field = weight_field
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "subset": Column("category", "int32"),
            "text": TEXT,
        }
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        fields = (self.text_field, self.subset_field, self.weight_field)
        return digest("clm-3", self._texts.fingerprint, *fields)

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        return encode_texts(batch, self._read, self._texts, self._examples)

    def _read(self, where: str, record: dict) -> tuple[list[str], str] | None:
        """Return the document and its subset; None if it is empty or its weight leaves it out."""
        if not counts(record, self.weight_field, (self.text_field, self.subset_field), where):
            return None
        text = text_field(record, self.text_field, where, "task.text_field", blank=True)
        subset = get_field(record, self.subset_field) if self.subset_field else None
        return ([text], "" if subset in (MISSING, None) else str(subset)) if text else None

    def _examples(self, where: str, ids: list[list[int]], subset: str) -> list[Example]:
        return [{"ids": [*ids[0], self._eos], "subset": subset}]
