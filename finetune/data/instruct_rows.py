"""Conversion of rows in the four instruction layouts to one checked list of messages.

    prompt     {"prompt": "2+2?", "completion": "4"}
    messages   {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    alpaca     {"instruction": "Add.", "input": "2+2", "output": "4"}
    sharegpt   {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}

All become messages of the second layout; prompt and completion may also be lists of such messages.
Turns may name their fields in either way, and a field `system` beside them is the system message. A
conversation is an optional system message, then user and assistant in turn.

Marks (`TRAINED`, `MASKED`) can exclude an assistant's turn, or a whole row, from scoring. Later
turns still see the unscored ones. Turns after the last scored one are left out. This module does
not render or tokenise.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Union

from finetune.config import InstructConfig
from finetune.data.fields import counts, full_text, parsed_cell, shown, text_field
from finetune.data.formats import first_names, json_type
from finetune.data.instruct_template import Message
from finetune.data.sources import MISSING, get_field
from finetune.data.utf8 import FIX, SKIP
from finetune.errors import UserError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
STYLES = {"role": ("content", ROLES), "from": ("value", SHAREGPT_ROLES)}
"""Key of the role -> key of the text, and the known roles."""
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "environment")
LAYOUTS = "prompt, messages, alpaca and sharegpt"
TRAINED = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Marks of a turn that say 1 or true where it is scored: OpenAI's, Axolotl's, ms-swift's and others'."""
MASKED = ("masked",)
"""Marks that say 1 or true where a turn is not scored: torchtune's."""
DETAILS = ("train_detail", "training_detail")
"""Axolotl's marks of parts of a turn: [{"begin_offset", "end_offset", "train"}, ..], both ends included, in characters."""
LIKE_A_MARK = re.compile(
    r"(^|_)(weights?|train|trained|training|trainable|loss|losses|mask|masked|masking)(_|$)"
)
SCORED = "scored"
"""Key of a read message that carries its mark, until `conversation` takes it out."""


Scored = Union[bool, list[bool]]
"""Mark of a turn that is scored or not, or one for each character of its content."""


def conversation(
    record: dict, where: str, cfg: InstructConfig
) -> tuple[list[Message], list[Scored]] | None:
    """Return a row's messages, ending with a scored one of the assistant, and which are scored.

    Returns:
        None if a mark leaves the whole row out.

    Raises:
        UserError: the row has none of the layouts (or not the one that `cfg.format` names), or
            breaks its rules; none of its turns is scored; a mark is unknown or its value is neither
            yes nor no.
    """
    layout = layout_of(record, cfg)
    if layout is None:
        present = first_names(record) or "no field at all"
        prompt, completion = (
            next((name for name in names if name in record), "FIELD")
            for names in (
                ("prompt", "instruction", "question", "input"),
                ("completion", "response", "answer", "output"),
            )
        )
        raise UserError(
            f"the row is none of {LAYOUTS}; it has {present}",
            where,
            f"Try task.format=prompt task.prompt_field={prompt} "
            f"task.completion_field={completion}.",
        )
    others = (cfg.prompt_field, cfg.completion_field)
    if not counts(record, cfg.weight_field, others, where) or any(
        _yes_or_no(record.get(key)) is False for key in ("train", "training", "trainable", "loss")
    ):
        return None
    messages = _messages(layout, record, where, cfg)
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(
            "the conversation has no turn of the assistant: nothing can be scored", where, FIX
        )
    check_order(messages, where)
    marks = [message.pop(SCORED, True) for message in messages]
    scored: list[Scored] = [
        mark if m["role"] == "assistant" else False for m, mark in zip(messages, marks, strict=True)
    ]
    if not any(scored):
        raise UserError(
            "no turn of the conversation is scored: all of the assistant's are marked as left out",
            where,
            f'Mark one of them with "weight": 1, {SKIP}',
        )
    last = max(i for i, kept in enumerate(scored) if kept)
    return messages[: last + 1], scored[: last + 1]


def question(record: dict, where: str, cfg: InstructConfig) -> str | list[Message]:
    """Return the question of a row, read as `conversation` reads it, with or without an answer.

    Returns:
        The prompt; or messages that end with the user's if there is more than a prompt: earlier
        turns, a system message, an input.

    Raises:
        UserError: the row has no question, or breaks its layout's rules.
    """
    layout = layout_of(record, cfg)
    asks = {
        "messages": "messages",
        "sharegpt": "conversations",
        "alpaca": "instruction",
        "prompt": cfg.prompt_field,
    }
    if layout is None or get_field(record, asks[layout]) in (MISSING, None):
        present = (
            n for n, field in asks.items() if get_field(record, field) not in (MISSING, None)
        )
        layout = next(present, "prompt")
    messages = _messages(layout, record, where, cfg, answered=False)
    for message in messages:
        message.pop(SCORED, None)
    check_order(messages, where)
    if messages[-1]["role"] != "user":
        raise UserError(
            "the conversation ends with the assistant: it asks nothing",
            where,
            "Leave out the assistant's last turn.",
        )
    return messages[0]["content"] if len(messages) == 1 and "input" not in messages[0] else messages


def layout_of(record: dict, cfg: InstructConfig) -> str | None:
    """Return the layout that `cfg.format` names, or the first one all of whose fields the row has.

    Layouts without null fields are preferred, because tables of mixed rows fill gaps with null.
    """
    if cfg.format != "auto":
        return cfg.format
    fields = {
        "prompt": (cfg.prompt_field, cfg.completion_field),
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "alpaca": ("instruction", "output"),
    }
    for absent in ((MISSING, None), (MISSING,)):
        for name, needed in fields.items():
            if not any(get_field(record, field) in absent for field in needed):
                return name
    return None


def _messages(
    layout: str, record: dict, where: str, cfg: InstructConfig, answered: bool = True
) -> list[Message]:
    """Convert a record of a layout to messages, its field `system` first.

    Args:
        answered: whether the fields `output` and `cfg.completion_field` are read.
    """
    if layout in ("messages", "sharegpt"):
        field, style = ("messages", "role") if layout == "messages" else ("conversations", "from")
        if field not in record:
            problem = f"field '{field}' is missing; this record has {first_names(record)}"
            raise UserError(problem, where, "Try task.format=auto.")
        return _system(record, where) + turns_of(record[field], field, where, style)
    if layout == "alpaca":
        messages = [*_system(record, where), _instruction(record, where)]
        if answered:
            key = "task.format=prompt task.completion_field"
            output = text_field(record, "output", where, key)
            messages.append({"role": "assistant", "content": output})
        return messages

    asked = cfg.prompt_field
    if not answered and get_field(record, asked) is MISSING:
        asked = "prompt"
    fields = (asked, cfg.completion_field) if answered else (asked,)
    values = [parsed_cell(get_field(record, field)) for field in fields]
    if all(map(_are_turns, values)):
        parts = zip(fields, values, strict=True)
        turns = [turn for field, value in parts for turn in turns_of(value, field, where, "role")]
        return with_system(record, turns, where)
    prompt = text_field(record, asked, where, "task.prompt_field")
    messages = [*_system(record, where), {"role": "user", "content": prompt}]
    if answered:
        completion = text_field(record, cfg.completion_field, where, "task.completion_field")
        messages.append({"role": "assistant", "content": completion})
    return messages


def _instruction(record: dict, where: str) -> Message:
    """Build the user's turn of an alpaca row."""
    instruction = text_field(record, "instruction", where, "task.format=prompt task.prompt_field")
    if record.get("history"):
        raise UserError(
            "field 'history' holds earlier turns, which the layout alpaca has no place for",
            where,
            f"Write the conversation as messages, {SKIP}",
        )
    extra = record.get("input")
    if extra is not None and not isinstance(extra, str):
        raise UserError(f"field 'input' is {json_type(extra)}, not a string", where, FIX)
    if not extra or not extra.strip():
        return {"role": "user", "content": instruction}
    return {
        "role": "user",
        "content": f"{instruction}\n\n{extra}",
        "instruction": instruction,
        "input": extra,
    }


def _are_turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and any(key in value[0] for key in STYLES)
    )


def with_system(record: dict, turns: list[Message], where: str) -> list[Message]:
    """Put the row's system message before the turns, unless they begin with one."""
    return turns if turns[0]["role"] == "system" else _system(record, where) + turns


def _system(record: dict, where: str) -> list[Message]:
    """Return the system message given beside the turns, if there is one."""
    text = record.get("system")
    if text is None or text == "":
        return []
    return [{"role": "system", "content": full_text(text, "field 'system'", where)}]


def turns_of(turns: Any, field: str, where: str, style: str) -> list[Message]:
    """Convert turns with role and content, or from and value, to messages.

    `style` is the expected first key.
    """
    turns = parsed_cell(turns)
    if not isinstance(turns, list):
        cell = "A text cell must hold a JSON array. " if isinstance(turns, str) else ""
        raise UserError(f"field '{field}' is {json_type(turns)}, not an array", where, cell + FIX)
    if not turns:
        raise UserError(f"field '{field}' is an empty array", where, FIX)
    return [_turn(turn, f"{field}[{i}]", where, style) for i, turn in enumerate(turns)]


def _turn(turn: Any, name: str, where: str, style: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{name} is {json_type(turn)}, not an object", where, FIX)
    style = next(
        (
            key
            for key, (text_key, _) in STYLES.items()
            if turn.get(key) is not None and text_key in turn
        ),
        style,
    )
    text_key, roles = STYLES[style]
    missing = [key for key in (style, text_key) if key not in turn]
    if missing:
        present = first_names(turn) or "nothing"
        raise UserError(f"{name} has no '{missing[0]}'; it has {present}", where, FIX)
    role = turn[style]
    if not isinstance(role, str) or role not in roles:
        near = get_close_matches(str(role).lower(), roles, 1)
        if role in TOOL_ROLES:
            remedy = f"Known are {', '.join(roles)}: put what tools say into the user's turns"
        else:
            remedy = f"Try '{near[0]}'" if near else f"Write one of {', '.join(roles)}"
        problem = f"{name} has the unknown {style} {role!r}"
        raise UserError(problem, where, f"{remedy}, {SKIP}")
    content = turn[text_key]
    if isinstance(content, list) and content:  # of text parts {"type": "text", "text": ..}
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else content
    message: Message = {
        "role": roles[role],
        "content": full_text(content, f"{name}.{text_key}", where),
    }
    mark: Scored | None = _mark(turn, name, where)
    detail = _detail(turn, message["content"], name, where)
    if detail and mark is not False:
        mark = detail if any(detail) else False
    if mark and message["role"] != "assistant":
        raise UserError(
            f"{name} is the {message['role']}'s and marked as scored; only the assistant's turns "
            "are",
            where,
            f"Remove the mark, {SKIP}",
        )
    return message if mark is None else message | {SCORED: mark}


def _mark(turn: dict, name: str, where: str) -> bool | None:
    """Tell whether a turn is scored according to its marks; None if it has no marks.

    Raises:
        UserError: two marks contradict each other, or one cannot be applied.
    """
    marks: dict[str, bool] = {}
    for key, value in turn.items():
        if value is None or key in DETAILS or not LIKE_A_MARK.search(str(key).lower()):
            continue
        if key not in (*TRAINED, *MASKED):
            raise UserError(
                f"{name} has '{key}', which looks like a mark of what is scored and is not known",
                where,
                f"Write \"weight\": 0 into turns that are not to be scored, or rename '{key}', "
                f"{SKIP}",
            )
        answer = _yes_or_no(value)
        if answer is None:
            raise UserError(
                f"{name}.{key} is {shown(str(value))[1:-1]}: a turn is scored (1) or not (0), "
                "nothing between",
                where,
                f"Write 0 or 1, {SKIP}",
            )
        marks[key] = answer != (key in MASKED)
    if len(set(marks.values())) > 1:
        raise UserError(
            f"{name} is marked as scored and as not scored: {', '.join(marks)}", where, FIX
        )
    return next(iter(marks.values()), None)


def _detail(turn: dict, content: str, name: str, where: str) -> list[bool] | None:
    """Return which characters of a turn are scored if it marks parts of its text.

    Characters that no part names are not scored.
    """
    key = next((key for key in DETAILS if turn.get(key)), None)
    if key is None:
        return None
    scored = [False] * len(content)
    for part in turn[key] if isinstance(turn[key], list) else [None]:
        values = part if isinstance(part, dict) else {}
        begin, end = values.get("begin_offset"), values.get("end_offset")
        answer = _yes_or_no(values.get("train"))
        if answer is None or not (
            type(begin) is int and type(end) is int and 0 <= begin <= end < len(content)
        ):
            raise UserError(
                f"{name}.{key} has {shown(str(part))[1:-1]}; a part is "
                f'{{"begin_offset", "end_offset", "train"}}, '
                f"characters 0 to {len(content) - 1}, both ends included",
                where,
                FIX,
            )
        scored[begin : end + 1] = [answer] * (end + 1 - begin)
    return scored


def _yes_or_no(value: Any) -> bool | None:
    """Parse true or false, 1 or 0, in any spelling; None for anything else."""
    text = str(value).strip().lower()
    answers = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return answers.get(text)


def check_order(messages: list[Message], where: str) -> None:
    """Raise a UserError unless user and assistant take turns, the user first."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        at = roles.index("system", 1)
        raise UserError(f"turn {at + 1} is a system message; only the first may be", where, FIX)
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[:1] == ["assistant"]:
        raise UserError(
            "the conversation starts with the assistant: there is no prompt to answer", where, FIX
        )
    for i, (first, second) in enumerate(pairwise(turns)):
        if first == second:
            at = i + 1 + len(roles) - len(turns)
            raise UserError(
                f"turns {at} and {at + 1} are both of the {first}",
                where,
                f"Join them into one, or fix their order, {SKIP}",
            )
