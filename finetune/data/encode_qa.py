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
from finetune.data.fields import TEXT, counts, digest, text_hash
from finetune.data.qa_rows import Question, questions
from finetune.data.tokenizer import TextTokenizer, ids_dtype
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
    question has; `text`, the hash of the context; `question`, JSON with id, where, context and answers, in its window 0 only.
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
            "text": TEXT,
            "question": Column("blob", "uint8"),
        }
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)
        self._separator = self._texts([SEPARATOR])[0]

    def fingerprint(self) -> str:
        cfg = self.cfg
        return digest("qa-4", self._texts.fingerprint, cfg.max_length, cfg.stride, cfg.weight_field)

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        return [self._row(where, record) for where, record in batch]

    def _row(self, where: str, record: dict) -> list[Example] | UserError:
        try:
            if not counts(record, self.cfg.weight_field, (), where):
                return []
        except UserError as error:
            return error
        asked, faults = [], []
        for question in questions(record, where):
            (faults if isinstance(question, UserError) else asked).append(question)
        # The questions of an article share contexts, each of which is tokenised once.
        contexts = list(dict.fromkeys(question.context for question in asked))
        encoded = dict(zip(contexts, self._texts.with_offsets(contexts), strict=True))
        asked_ids = self._texts([question.question for question in asked])
        examples: list[Example] = []
        for question, ids in zip(asked, asked_ids, strict=True):
            try:
                examples += self._windows(question, ids, encoded[question.context])
            except UserError as error:
                faults.append(error)
        return PartlyBad(examples, faults) if faults else examples

    def _windows(self, question: Question, question_ids: list[int], context: Any) -> list[Example]:
        prefix = [*question_ids, *self._separator]
        stride, at = self.cfg.stride, len(prefix)
        room = self.cfg.max_length - at - 1  # beside the question and the null slot
        if room < 1 or (len(context.ids) > room and room <= stride):
            raise UserError(
                f"the question has {len(question_ids)} tokens: task.max_length = "
                f"{self.cfg.max_length} leaves {max(0, room)} for the context, of which windows "
                f"share task.stride = {stride}",
                question.where,
                f"Shorten it, raise task.max_length (2048 at most) or lower task.stride, {SKIP}",
            )
        offsets = np.array(context.offsets, np.int32).reshape(-1, 2)
        spans = [
            token_span(offsets, start + len(text) - len(text.lstrip()), start + len(text.rstrip()))
            for start, text in question.answers
        ]
        description = {
            "id": question.id,
            "where": question.where,
            "context": question.context,
            "answers": [text for _, text in question.answers],
        }
        # The questions of a context stay together where rows are held out.
        text = text_hash(question.context)
        examples: list[Example] = []
        for number, begin in enumerate(window_starts(len(context.ids), room, stride)):
            ids, chars = context.ids[begin : begin + room], offsets[begin : begin + room]
            null = at + len(ids)
            # Of several answers, the first that lies wholly in the window; else the null slot.
            inside = [(a, b) for a, b in spans if a >= begin and b < begin + len(ids)]
            start, end = (at - begin + place for place in inside[0]) if inside else (null, null)
            examples.append(
                {
                    "ids": np.array([*prefix, *ids, self._eos]),
                    "char_start": np.pad(chars[:, 0], (at, 1)),
                    "char_end": np.pad(chars[:, 1], (at, 1)),
                    "context_at": at,
                    "start": start,
                    "end": end,
                    "window": number,
                    "answers": len(spans),
                    "text": text,
                    "question": b""
                    if number
                    else json.dumps(description, ensure_ascii=False).encode(),
                }
            )
        return examples


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
