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

import json
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import numpy as np

from finetune.config import InstructConfig
from finetune.data.columns import Column, Example
from finetune.data.fields import TEXT, WHERE, digest, encode_texts, shown, text_hash
from finetune.data.instruct_rows import Scored, conversation
from finetune.data.instruct_template import RENDER_FAULTS, Message, Template, closed
from finetune.data.tokenizer import TextTokenizer, ids_dtype
from finetune.data.utf8 import SKIP
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[list[int], list[int], list[bool]]
"""Ids of a prompt, and of its completion with eos, of which those are scored."""
Pieces = tuple[list[str], list[Scored], int]
"""Texts of prompts and completions in turn; which of the completions, or of their characters, are scored; the hash of
the conversation, whatever the template."""


class InstructEncoder:
    """Encoder of rows to the columns `ids`, `scored`, `cut`, `where` and `text`.

    `scored` is 1 where the token is a target; `cut` counts the tokens lost on the left.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: InstructConfig, template: Template):
        self.cfg, self.template = cfg, template
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "scored": Column("token", "uint8"),
            "cut": Column("scalar", "int32"),
            "where": WHERE,
            "text": TEXT,
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
        return encode_texts(batch, self._read, self._texts, self._examples)

    def _read(self, where: str, record: dict) -> tuple[list[str], Pieces] | None:
        """Return prompts and completions of a row in turn, or None if its mark leaves it out.

        They come once to be tokenised, and once with the mark of each completion.
        """
        read = conversation(record, where, self.cfg)
        if read is None:
            return None
        messages, scored = read
        refuse_marks(messages, self.template, where)
        pieces = self.template.pieces(messages, where)
        answers = [
            (message["content"], mark)
            for message, mark in zip(messages, scored, strict=True)
            if message["role"] == "assistant"
        ]
        marks: list[Scored] = []
        for (content, mark), text in zip(answers, pieces[1::2], strict=True):
            if isinstance(mark, list):
                # Marks of the content's characters become marks of the completion that the template
                # made of it. Text that the template adds, or eos, is scored as the content's first
                # or last character is.
                kept = content.strip()
                first = len(content) - len(content.lstrip())
                inner = mark[first : first + len(kept)]
                at = text.find(kept)
                mark = [inner[0]] * at + inner + [inner[-1]] * (len(text) - at - len(kept))
            marks.append(mark)
        return pieces, (pieces, marks, conversation_hash(messages))

    def _examples(self, where: str, ids: list[list[int]], read: Pieces) -> list[Example]:
        # Prompt and completion of every scored turn; others are part of the next prompt.
        pieces, marks, said = read
        turns: list[Turn] = []
        prompt: list[int] = []
        for prompt_ids, completion, text, mark in zip(
            ids[::2], ids[1::2], pieces[1::2], marks, strict=True
        ):
            prompt, completion = [*prompt, *prompt_ids], [*completion, self._eos]
            if not mark:
                prompt += completion
                continue
            flags = [True] * len(completion)
            if isinstance(mark, list):  # an id is scored if all of its characters are
                (encoding,) = self._texts.with_offsets([text])
                flags = [all(mark[a : max(b, a + 1)]) for a, b in encoding.offsets] + [mark[-1]]
            turns.append((prompt, completion, flags))
            prompt = []

        if not turns[0][0]:
            raise UserError(
                "the prompt is empty: the completion's first token would have nothing before it",
                where,
                "Text without prompts trains with task=clm.",
            )
        longest = max(len(completion) for _, completion, _ in turns)
        if longest >= self.cfg.max_length:
            raise too_long("a completion", longest, self.cfg.max_length, where)

        # Every completion is scored in one window; the tokens before it are context.
        flat = [i for prompt, completion, _ in turns for i in (*prompt, *completion)]
        all_ids = np.array(flat, np.int64)
        scored = np.concatenate([[0] * len(prompt) + flags for prompt, _, flags in turns])
        ends = list(accumulate(len(prompt) + len(completion) for prompt, completion, _ in turns))
        examples: list[Example] = []
        covered = 0
        for begin, scored_from, end in windows(ends, self.cfg.max_length):
            flags = scored[begin:end].astype(np.int64)
            flags[: max(0, scored_from - begin)] = 0
            examples.append(
                {
                    "ids": all_ids[begin:end],
                    "scored": flags,
                    "cut": max(0, begin - covered),
                    "text": said,
                }
            )
            covered = end
        return examples


def windows(ends: list[int], max_length: int) -> list[tuple[int, int, int]]:
    """Return (begin, scored from, end) of examples that score every turn once.

    Turns stay in order, in as few examples as possible.

    Args:
        ends: end of each turn, in tokens from the conversation's start.
    """
    examples, first = [], 0
    while first < len(ends):
        start = ends[first - 1] if first else 0
        last = first
        while last + 1 < len(ends) and ends[last + 1] - start <= max_length:
            last += 1
        examples.append((max(0, ends[last] - max_length), start, ends[last]))
        first = last + 1
    return examples


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
    return [i for piece in closed(cast(list, pieces), eos) for i in piece]


def too_long(name: str, tokens: int, limit: int, where: str) -> UserError:
    """Return the error for an answer that does not fit into task.max_length, its `limit`."""
    return UserError(
        f"{name} has {tokens} tokens with its eos; task.max_length = {limit} leaves {limit - 1}",
        where,
        f"Shorten it, or raise task.max_length to {tokens + 1} (2048 at most), {SKIP}",
    )


def conversation_hash(messages: list[Message]) -> int:
    """Return the `text_hash` of a conversation, whatever template renders it."""
    return text_hash(json.dumps([[message["role"], message["content"]] for message in messages]))


def refuse_marks(messages: list[Message], template: Template, where: str) -> None:
    """Raise a UserError if a text contains the token that ends turns, or another of the template's."""
    for message in messages:
        if mark := next((mark for mark in template.marks if mark in message["content"]), None):
            ends = mark == template.eos
            raise UserError(
                f"the {message['role']}'s text {shown(message['content'])} holds '{mark}', which "
                + ("ends turns" if ends else "begins turns"),
                where,
                "Remove it, as it is added "
                f"{'behind every completion' if ends else 'by the template'}, {SKIP}",
            )
