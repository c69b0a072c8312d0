"""Encoder of questions and contexts into windows with a slot for "no answer" (extractive QA).

Flow: questions (`qa_rows`) -> ids of question and context -> windows that overlap by `stride`
tokens. Question q, newline n, context c1 to c5, eos E; three context tokens fit, stride 1:

    window 0   q q n c1 c2 c3 E       answer c4 c5 is not here, so both targets are at E
    window 1   q q n c3 c4 c5 E       targets start c4, end c5
               ^ first                 ^ null slot

The question comes first because a token of a causal model attends only to earlier tokens: every
context token sees the question, and the trailing eos sees everything. At index 0, where BERT puts
"no answer", GPT-J has seen nothing. Of several annotated answers, the first one that lies wholly in
a window is its target. Scoring is done elsewhere.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from finetune.config import QaConfig
from finetune.data.columns import Column, Example, PartlyBad
from finetune.data.encode_clm import ids_dtype
from finetune.data.fields import counts, digest
from finetune.data.qa_rows import Question, questions
from finetune.data.tokenizer import backend, tokenizer_fingerprint
from finetune.data.utf8 import SKIP
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"
"""Between question and context."""


class QaEncoder:
    """Encoder of rows into windows, one example each.

    Columns: `ids`; `char_start`, `char_end` of every token in the context, 0 elsewhere;
    `context_at`, the first context token; `start`, `end`, the targets, all counted from the
    example's first token; `window`, its number within the question; `answers`, how many the
    question has; `question`, JSON with id, where, context and answers, in its window 0 only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: QaConfig):
        self.cfg = cfg
        scalar, token = Column("scalar", "int32"), Column("token", "int32")
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "char_start": token,
            "char_end": token,
            "context_at": scalar,
            "start": scalar,
            "end": scalar,
            "window": scalar,
            "answers": scalar,
            "question": Column("blob", "uint8"),
        }
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._tokens = _OffsetTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)
        self._separator = self._tokens([SEPARATOR])[0].ids

    def fingerprint(self) -> str:
        return digest(
            "qa-4", self._fingerprint, self.cfg.max_length, self.cfg.stride, self.cfg.weight_field
        )

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        return [self._row(where, record) for where, record in batch]

    def _row(self, where: str, record: dict) -> list[Example] | UserError:
        try:
            if not counts(record, self.cfg.weight_field, (), where):
                return []
        except UserError as error:
            return error
        found = list(questions(record, where))
        asked = [q for q in found if isinstance(q, Question)]
        faults = [q for q in found if isinstance(q, UserError)]
        contexts = list(dict.fromkeys(q.context for q in asked))
        encoded = dict(zip(contexts, self._tokens(contexts), strict=True))
        examples: list[Example] = []
        for question, tokens in zip(asked, self._tokens([q.question for q in asked]), strict=True):
            try:
                examples += self._windows(
                    question, [*tokens.ids, *self._separator], encoded[question.context]
                )
            except UserError as error:
                faults.append(error)
        return PartlyBad(examples, faults) if faults else examples

    def _windows(self, question: Question, prefix: list[int], context: Any) -> list[Example]:
        ids, chars = context.ids, np.array(context.offsets, np.int32).reshape(-1, 2)
        room = self._room(question, prefix, len(ids))
        spans = [
            token_span(chars, start + len(text) - len(text.lstrip()), start + len(text.rstrip()))
            for start, text in question.answers
        ]
        return [
            self._window(
                question,
                prefix,
                ids[begin : begin + room],
                chars[begin : begin + room],
                number,
                [(first - begin, last - begin) for first, last in spans],
            )
            for number, begin in enumerate(window_starts(len(ids), room, self.cfg.stride))
        ]

    def _window(
        self,
        question: Question,
        prefix: list[int],
        ids: list[int],
        chars: np.ndarray,
        number: int,
        spans: list[tuple[int, int]],
    ) -> Example:
        at, size = len(prefix), len(prefix) + len(ids) + 1
        null = size - 1
        start, end = next(
            ((at + a, at + b) for a, b in spans if a >= 0 and b < len(ids)), (null, null)
        )
        starts, ends = np.zeros(size, np.int32), np.zeros(size, np.int32)
        starts[at:null], ends[at:null] = chars[:, 0], chars[:, 1]
        return {
            "ids": np.array([*prefix, *ids, self._eos]),
            "char_start": starts,
            "char_end": ends,
            "context_at": at,
            "start": start,
            "end": end,
            "window": number,
            "answers": len(spans),
            "question": b"" if number else _describe(question),
        }

    def _room(self, question: Question, prefix: list[int], context_length: int) -> int:
        """Return how many context tokens fit beside the question and the null slot."""
        room = self.cfg.max_length - len(prefix) - 1
        if room < 1 or (context_length > room and room <= self.cfg.stride):
            raise UserError(
                f"the question has {len(prefix) - len(self._separator)} tokens: task.max_length = "
                f"{self.cfg.max_length} leaves {max(0, room)} for the context, of which windows share "
                f"task.stride = {self.cfg.stride}",
                question.where,
                f"Shorten it, raise task.max_length (2048 at most) or lower task.stride, {SKIP}",
            )
        return room


class _OffsetTokenizer:
    """Tokenizer of texts into ids and character offsets.

    It is a copy of the given tokenizer, without truncation and padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(backend(tokenizer).to_str())
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, texts: list[str]) -> list[Any]:
        return self._backend.encode_batch(texts, add_special_tokens=False)


def token_span(chars: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """Return the first and last token of the characters [start, end) of the text.

    `chars` (T, 2) are the tokens' offsets. If BPE splits a character, its tokens all have the
    offsets of that character, and the span includes them all.
    """
    first = int(np.searchsorted(chars[:, 1], start, side="right"))
    last = int(np.searchsorted(chars[:, 0], end, side="left")) - 1
    return first, last


def window_starts(length: int, room: int, stride: int) -> list[int]:
    """Return the starts of windows of `room` tokens that overlap by `stride`.

    The last window may be shorter.
    """
    starts = [0]
    while starts[-1] + room < length:
        starts.append(starts[-1] + room - stride)
    return starts


def _describe(question: Question) -> bytes:
    return json.dumps(
        {
            "id": question.id,
            "where": question.where,
            "context": question.context,
            "answers": [text for _, text in question.answers],
        },
        ensure_ascii=False,
    ).encode()
