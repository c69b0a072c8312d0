"""Encoder of instructions: conversations -> ids of which only the assistant's are scored.

Flow: row -> messages (`instruct_rows`) -> prompt and completion texts (`instruct_template`) -> ids.
Each text is encoded by itself, so that a completion starts at a token of its own. With prompt
tokens P P P, completion C C and eos E:

    ids      P P P C C E
    scored   0 0 0 1 1 1

    two turns, too long for max_length 8:  p p P P C E | P C C E
    example 1:  P P C E             scored 0 0 1 1
    example 2:  P P C E P C C E     scored 0 0 0 0 0 1 1 1

eos is scored after every completion: without it the model never learns to stop. A completion that
is marked as not to be scored is part of the next prompt, its eos included. A prompt that does not
fit loses tokens on its left; a completion never loses any. A conversation that does not fit becomes
several examples that score every completion once, each with as much of the preceding conversation
as there is room for. Packing is done elsewhere (`packing`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, cast

import numpy as np

from finetune.config import InstructConfig
from finetune.data.columns import Column, Example
from finetune.data.encode_clm import TextTokenizer, ids_dtype
from finetune.data.fields import digest, shown
from finetune.data.instruct_rows import Scored, conversation
from finetune.data.instruct_template import RENDER_FAULTS, Message, Template
from finetune.data.utf8 import SKIP
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[list[int], list[int], list[bool]]
"""Ids of a prompt, and of its completion with eos, of which those are scored."""
Pieces = tuple[list[str], list[Scored]]
"""Texts of prompts and completions in turn, and which of the completions, or of their characters, are scored."""


class InstructEncoder:
    """Encoder of rows to the columns `ids`, `scored`, `cut` and `where`.

    `scored` is 1 where the token is a target; `cut` counts the tokens lost on the left.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: InstructConfig, template: Template):
        self.cfg, self.template = cfg, template
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "scored": Column("token", "uint8"),
            "cut": Column("scalar", "int32"),
            "where": Column("blob", "uint8"),
        }
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        cfg = self.cfg
        return digest(
            "instruct-3",
            self._texts.fingerprint,
            self.template.text,
            cfg.format,
            cfg.prompt_field,
            cfg.completion_field,
            cfg.weight_field,
            cfg.max_length,
        )

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        rows = [self._pieces(where, record) for where, record in batch]
        ids = iter(
            self._texts([piece for row in rows if isinstance(row, tuple) for piece in row[0]])
        )
        results: list[list[Example] | UserError] = []
        for (where, _), row in zip(batch, rows, strict=True):
            if not isinstance(row, tuple):
                results.append([] if row is None else row)
                continue
            turns: list[Turn] = []
            prompt: list[int] = []
            for text, scored in zip(row[0][1::2], row[1], strict=True):
                prompt, completion = [*prompt, *next(ids)], [*next(ids), self._eos]
                if scored:
                    turns.append((prompt, completion, self._flags(text, scored, len(completion))))
                prompt = [] if scored else [*prompt, *completion]
            results.append(self._examples(where, turns))
        return results

    def _pieces(self, where: str, record: dict) -> Pieces | UserError | None:
        """Return prompts and completions of a row, its error, or None if its mark leaves it out."""
        try:
            read = conversation(record, where, self.cfg)
            if read is None:
                return None
            messages, scored = read
            refuse_eos(messages, self.template.eos, where)
            pieces = self.template.pieces(messages, where)
            answers = [
                (m["content"], kept)
                for m, kept in zip(messages, scored, strict=True)
                if m["role"] == "assistant"
            ]
            marks = [
                _spread(kept, content, text) if isinstance(kept, list) else kept
                for (content, kept), text in zip(answers, pieces[1::2], strict=True)
            ]
            return pieces, marks
        except UserError as error:
            return error

    def _flags(self, text: str, scored: Scored, size: int) -> list[bool]:
        """Return which ids of a completion, including the closing eos, are scored.

        An id is scored if all of its characters are.
        """
        if not isinstance(scored, list):
            return [True] * size
        return [
            *(
                all(scored[first : max(behind, first + 1)])
                for first, behind in self._texts.offsets(text)
            ),
            scored[-1],
        ]

    def _examples(self, where: str, turns: list[Turn]) -> list[Example] | UserError:
        if not turns[0][0]:
            return UserError(
                "the prompt is empty: the completion's first token would have nothing before it",
                where,
                "Text without prompts trains with task=clm.",
            )
        longest = max(len(completion) for _, completion, _ in turns)
        if longest >= self.cfg.max_length:
            return UserError(
                f"a completion has {longest} tokens with its eos; task.max_length = "
                f"{self.cfg.max_length} leaves {self.cfg.max_length - 1}",
                where,
                f"Shorten it, or raise task.max_length to {longest + 1} (2048 at most), {SKIP}",
            )
        ids = np.fromiter(
            (i for prompt, completion, _ in turns for i in (*prompt, *completion)), np.int64
        )
        scored = np.concatenate([[0] * len(prompt) + flags for prompt, _, flags in turns]).astype(
            np.int64
        )
        ends = list(accumulate(len(prompt) + len(completion) for prompt, completion, _ in turns))
        cuts = windows(ends, self.cfg.max_length)
        before = [0, *(end for _, _, end in cuts)]
        found = [
            _window(ids, scored, *cut, max(0, cut[0] - end))
            for cut, end in zip(cuts, before, strict=False)
        ]
        return [example | {"where": where.encode("utf-8", "backslashreplace")} for example in found]


def _spread(scored: list[bool], content: str, text: str) -> list[bool]:
    """Map marks of a content's characters to the completion that the template made of it.

    Text that the template adds, or eos, is scored as the content's first or last character is.
    """
    kept = content.strip()
    first = len(content) - len(content.lstrip())
    inner = scored[first : first + len(kept)]
    at = text.find(kept)
    return [inner[0]] * at + inner + [inner[-1]] * (len(text) - at - len(kept))


def windows(ends: list[int], max_length: int) -> list[tuple[int, int, int]]:
    """Return (begin, scored from, end) of examples that score every turn once.

    Turns stay in order, in as few examples as possible.

    Args:
        ends: end of each turn, in tokens from the conversation's start.
    """
    found, first = [], 0
    while first < len(ends):
        start = ends[first - 1] if first else 0
        last = first
        while last + 1 < len(ends) and ends[last + 1] - start <= max_length:
            last += 1
        found.append((max(0, ends[last] - max_length), start, ends[last]))
        first = last + 1
    return found


def chat_template_differs(
    tokenizer: PreTrainedTokenizerBase, template: Template, messages: list[Message]
) -> str | None:
    """Describe how an export's `apply_chat_template` differs from training; None if it does not.

    Compares the whole conversation and the text before each answer. If the texts are equal, ids can
    differ only at the beginning of an answer: in training a token starts there, while in the
    tokenized whole text a token may span that place.
    """
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for kept, asks in [*((messages[:i], True) for i in ends), (messages[: ends[-1] + 1], False)]:
        trained = prompt_ids(template, tokenizer, kept)
        try:
            there = cast(
                list,
                tokenizer.apply_chat_template(kept, add_generation_prompt=asks, return_dict=False),
            )
        except RENDER_FAULTS as error:
            return f"an error ({error})"
        if there != trained:
            at = next(
                (n for n, (a, b) in enumerate(zip(trained, there, strict=False)) if a != b), 0
            )
            ours, theirs = (
                [tokenizer.decode([i]) for i in ids[at : at + 3]] for ids in (trained, there)
            )
            return f"{theirs} where training read {ours}"
    return None


def prompt_ids(
    template: Template, tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]
) -> list[int]:
    """Return the ids of a prompt for generation, the same that precede a completion in training."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    pieces = tokenizer(template.pieces(messages, "prompt"), add_special_tokens=False)["input_ids"]
    eos = cast(int, tokenizer.eos_token_id)
    return [
        i for n, piece in enumerate(cast(list, pieces)) for i in (*piece, *([eos] if n % 2 else []))
    ]


def _window(
    ids: np.ndarray, scored: np.ndarray, begin: int, scored_from: int, end: int, lost: int
) -> Example:
    """Build one example; `lost` counts the tokens before it that are in no example."""
    flags = scored[begin:end].copy()
    flags[: max(0, scored_from - begin)] = 0
    return {"ids": ids[begin:end], "scored": flags, "cut": lost}


def refuse_eos(messages: list[Message], eos: str, where: str) -> None:
    """Raise a UserError if a text contains the token that ends turns."""
    for message in messages:
        if eos and eos in message["content"]:
            raise UserError(
                f"the {message['role']}'s text {shown(message['content'])} holds '{eos}', which ends turns",
                where,
                f"Remove it, as it is added behind every completion, {SKIP}",
            )
