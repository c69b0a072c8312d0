"""Encoder of preferences: a prompt with a chosen and a rejected answer -> two documents, one behind the other.

Flow: row -> two conversations (`conversations`) -> texts (`instruct_template`) -> ids. With prompt
tokens P, chosen answer C, rejected answer R and eos E:

    ids      P P C C E P P R E        prompt 2, split 5
    scored   0 0 1 1 1 0 0 1 1

Answers are rendered, tokenised and scored as completions are in instruction tuning. Both documents
have the same prompt: what does not fit into task.max_length beside the longer answer is cut from
its left. An answer never loses a token. Everything after the turns that both conversations share
is the answer, so it may have several turns, of which the assistant's are scored.

The layouts of public sets (TRL, hh-rlhf, UltraFeedback, Orca and Argilla pairs, LLaMA-Factory,
ms-swift, OpenAI) are recognised by their fields:

    prompt or question, system    text, or messages
    instruction, input            text
    conversations, messages       the turns before the answer
    chosen, rejected              text; one message; the answer's messages; or the whole
                                  conversation, as messages or as text with "\\n\\nHuman: " turns
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from finetune.config import InstructConfig, PairConfig, RewardConfig
from finetune.data.columns import Column, Example
from finetune.data.encode_instruct import conversation_hash, refuse_marks, too_long
from finetune.data.fields import TEXT, WHERE, counts, digest, encode_texts, parsed_cell
from finetune.data.instruct_rows import SCORED, check_order, question, turns_of, with_system
from finetune.data.instruct_template import Message, Template, closed
from finetune.data.sources import MISSING, field_error, get_field
from finetune.data.tokenizer import TextTokenizer, ids_dtype
from finetune.data.utf8 import FIX, SKIP
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "non_preferred_output")
"""Fields of public sets that hold an answer, looked up where the configured one is absent."""
ANSWER = ("content", "response", "answer", "completion", "text")
"""Fields of public sets that hold the text of one of several answers."""
HUMAN = re.compile(r"\n\n(Human|Assistant):")
"""Beginning of a turn in conversations that are written as one text, as in hh-rlhf."""
ROLES = {"Human": "user", "Assistant": "assistant"}


class PreferenceEncoder:
    """Encoder of rows to the columns `ids`, `scored`, `prompt`, `split`, `margin`, `cut`, `where`,
    `text`.

    `prompt` and `split` are the tokens of the prompt and of the first document; `margin` is the
    reward model's, else 0; `cut` counts the prompt's lost tokens; `text` is the hash of the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cfg: PairConfig,
        template: Template,
    ):
        self.cfg, self.template = cfg, template
        self.margin_field = cfg.margin_field if isinstance(cfg, RewardConfig) else None
        self.columns = {
            "ids": Column("token", ids_dtype(tokenizer)),
            "scored": Column("token", "uint8"),
            "prompt": Column("scalar", "int32"),
            "split": Column("scalar", "int32"),
            "margin": Column("scalar", "float32"),
            "cut": Column("scalar", "int32"),
            "where": WHERE,
            "text": TEXT,
        }
        self._texts = TextTokenizer(tokenizer)
        self._eos = cast(int, tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        cfg = self.cfg
        return digest(
            "preference-1",
            self._texts.fingerprint,
            self.template.text,
            cfg.prompt_field,
            cfg.chosen_field,
            cfg.rejected_field,
            self.margin_field,
            cfg.weight_field,
            cfg.max_length,
        )

    def encode(self, batch: list[tuple[str, dict]]) -> list[list[Example] | UserError]:
        return encode_texts(batch, self._read, self._texts, self._example)

    def _read(self, where: str, record: dict) -> tuple[list[str], tuple] | None:
        """Return the texts of both conversations, and what `_example` needs to take them apart."""
        cfg = self.cfg
        used = (cfg.prompt_field, cfg.chosen_field, cfg.rejected_field)
        if not counts(record, cfg.weight_field, used, where):
            return None
        margin = get_field(record, self.margin_field) if self.margin_field else None
        try:
            margin = 0.0 if margin in (MISSING, None) else float(margin)
        except (TypeError, ValueError):
            raise UserError(
                f"field '{self.margin_field}' is {margin!r}, not a number",
                where,
                f"Fix it, or set task.margin_field=null if it is no margin of rewards, {SKIP}",
            ) from None
        both, shared = conversations(record, where, cfg)
        texts, sides = [], []
        for messages in both:
            refuse_marks(messages, self.template, where)
            pieces = self.template.pieces(messages, where)
            unscored = sum(message["role"] == "assistant" for message in messages[:shared])
            texts += pieces
            sides.append((len(pieces), unscored))
        # Pairs with the same prompt stay together where rows are held out.
        return texts, (sides, margin, conversation_hash(both[0][:shared]))

    def _example(self, where: str, ids: list[list[int]], read: tuple) -> list[Example]:
        # The ids of each document, and which of them are the answer's.
        sides, margin, prompt_hash = read
        documents, prompt = [], 0
        for pieces, unscored in sides:
            own, ids = ids[:pieces], ids[pieces:]
            parts = closed(own, self._eos)
            flags = [
                [n % 2 == 1 and n // 2 >= unscored] * len(part) for n, part in enumerate(parts)
            ]
            prompt = sum(map(len, parts[: 2 * unscored + 1]))
            documents.append((np.concatenate(parts), np.concatenate(flags)))

        longest = max(len(tokens) - prompt for tokens, _ in documents)
        if prompt == 0:
            problem = "the prompt is empty: an answer's first token would have nothing before it"
            raise UserError(problem, where, FIX)
        if longest >= self.cfg.max_length:
            raise too_long("an answer", longest, self.cfg.max_length, where)

        cut = max(0, prompt + longest - self.cfg.max_length)
        return [
            {
                "ids": np.concatenate([tokens[cut:] for tokens, _ in documents]).astype(np.int64),
                "scored": np.concatenate([flags[cut:] for _, flags in documents]).astype(np.int64),
                "prompt": prompt - cut,
                "split": len(documents[0][0]) - cut,
                "margin": margin,
                "cut": cut,
                "text": prompt_hash,
            }
        ]


class AnswersEncoder(PreferenceEncoder):
    """Encoder of a prompt with any number of answers: each answer is an example of one document.

    An answer is a text, a message, or an object with its text under one of `ANSWER`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: RewardConfig, template: Template):
        super().__init__(tokenizer, cfg, template)
        self.columns = {name: self.columns[name] for name in ("ids", "cut", "where", "text")}
        self.field = cast(str, cfg.answers_field)

    def fingerprint(self) -> str:
        return digest("answers-1", super().fingerprint(), self.field)

    def _read(self, where: str, record: dict) -> tuple[list[str], tuple] | None:
        """Return the texts of all conversations, the number of each one's, and the prompt's hash."""
        answers = parsed_cell(get_field(record, self.field))
        if answers is MISSING:
            raise field_error(record, self.field, where, "task.answers_field")
        if not isinstance(answers, list) or not answers:
            raise UserError(f"field '{self.field}' is no list of answers", where, FIX)
        prompt = prompt_of({k: v for k, v in record.items() if k != self.field}, where, self.cfg)
        texts, sizes = [], []
        for answer in answers:
            if isinstance(answer, dict):
                answer = next((answer[name] for name in ANSWER if name in answer), None)
            if not isinstance(answer, str) or not answer.strip():
                problem = f"field '{self.field}' holds an answer that is no text: {answer!r:.60}"
                raise UserError(problem, where, FIX)
            messages: list[Message] = [*prompt, {"role": "assistant", "content": answer}]
            refuse_marks(messages, self.template, where)
            pieces = self.template.pieces(messages, where)
            texts += pieces
            sizes.append(len(pieces))
        return texts, (sizes, conversation_hash(prompt))

    def _example(self, where: str, ids: list[list[int]], read: tuple) -> list[Example]:
        sizes, prompt_hash = read
        examples, limit = [], self.cfg.max_length
        for size in sizes:
            parts, ids = closed(ids[:size], self._eos), ids[size:]
            if len(parts[-1]) >= limit:
                raise too_long("an answer", len(parts[-1]), limit, where)
            tokens = np.concatenate(parts).astype(np.int64)
            cut = max(0, len(tokens) - limit)
            examples.append({"ids": tokens[-limit:], "cut": cut, "text": prompt_hash})
        return examples


def conversations(record: dict, where: str, cfg: PairConfig) -> tuple[list[list[Message]], int]:
    """Return the chosen and the rejected conversation, and the number of turns that they share.

    Raises:
        UserError: a field is missing or of a wrong kind, a conversation breaks the rules of
            instruction rows, or the two do not differ in their answer.
    """
    both: list[list[Message]] = []
    for key, others in (("chosen_field", CHOSEN), ("rejected_field", REJECTED)):
        field = getattr(cfg, key)
        name = next((f for f in (field, *others) if get_field(record, f) is not MISSING), field)
        value = parsed_cell(get_field(record, name))
        if value is MISSING and others is CHOSEN and "messages" in record:
            name, value = "messages", parsed_cell(record["messages"])
        if value is MISSING and isinstance(record.get("label"), (bool, int)):
            raise UserError(
                "the row has one answer and a label; preferences are learnt from pairs of answers",
                where,
                "Join a good and a bad answer of each prompt: "
                '{"prompt": .., "chosen": .., "rejected": ..}',
            )
        if value is MISSING:
            raise field_error(record, field, where, f"task.{key}")
        if isinstance(value, str) and HUMAN.match(value):
            value = dialogue(value)
        elif isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        turns = turns_of([value] if isinstance(value, dict) else value, name, where, "role")
        whole = turns[0]["role"] != "assistant"
        prompt = [] if whole else prompt_of(record, where, cfg)
        turns = with_system(record, turns, where) if whole else [*prompt, *turns]
        for message in turns:
            message.pop(SCORED, None)
        check_order(turns, where)
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        both.append(turns)

    chosen, rejected = both
    pairs = zip(chosen, rejected, strict=False)
    shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if chosen == rejected:
        raise UserError("the chosen and the rejected answer are the same", where, FIX)
    for messages in both:
        if shared == 0 or shared == len(messages) or messages[shared]["role"] != "assistant":
            raise UserError(
                "the chosen and the rejected answer do not answer the same prompt", where, FIX
            )
    return both, shared


def prompt_of(record: dict, where: str, cfg: PairConfig) -> list[Message]:
    """Return the turns before the answers, which end with the user's."""
    fields = (cfg.prompt_field, "question", "query")
    name = next((f for f in fields if get_field(record, f) not in (MISSING, None)), None)
    source = {key: value for key, value in record.items() if key not in (*CHOSEN, *REJECTED)}
    if name is not None:
        value = get_field(record, name)
        if isinstance(value, str) and HUMAN.match(value):
            value = dialogue(value)
        source = {"prompt": value, "system": record.get("system")}
    elif isinstance(record.get("input"), dict):  # OpenAI's layout
        source = record["input"]
    elif isinstance(turns := parsed_cell(record.get("messages")), list):
        # The chosen answer ends the messages, and the rejected one stands beside them.
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns = turns[:-1]
        source = source | {"messages": turns}
    asked = question(source, where, InstructConfig())
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def dialogue(text: str) -> list[dict[str, Any]]:
    """Split a text with "Human:" and "Assistant:" turns; an unanswered "Assistant:" is left out."""
    parts = HUMAN.split(text)[1:]
    turns = [
        {"role": ROLES[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if len(turns) > 1 and not turns[-1]["content"] else turns
