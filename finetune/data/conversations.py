"""Rows of the four instruction layouts -> one list of messages, checked.

    prompt     {"prompt": "2+2?", "completion": "4"}
    messages   {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    alpaca     {"instruction": "Add.", "input": "2+2", "output": "4"}
    sharegpt   {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}

All become messages of the second layout. A conversation is: perhaps a system message, then user and assistant in turn.
Turns behind the assistant's last are left out: nothing of them is scored. Renders and tokenises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from finetune.config import InstructConfig
from finetune.data.fields import MEND, full_text, text_field
from finetune.data.records import MISSING, get_field
from finetune.data.rows import SKIP, json_type
from finetune.data.template import Message
from finetune.errors import UserError

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"}
LAYOUTS = "prompt, messages, alpaca and sharegpt"


def conversation(record: dict, where: str, cfg: InstructConfig) -> list[Message]:
    """The row's messages, the last of them the assistant's.

    Raises:
        UserError: the row has none of the layouts (or not the one that `cfg.format` names), or breaks its rules.
    """
    layout = layout_of(record, cfg) if cfg.format == "auto" else cfg.format
    if layout is None:
        raise _unknown_layout(record, where, cfg)
    messages = READERS[layout](record, where, cfg)
    _check_order(messages, where)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[: last + 1]


def check_format(name: str) -> None:
    if name != "auto" and name not in READERS:
        raise UserError(f"task.format = {name} is unknown", remedy=f"Choose from auto, {LAYOUTS}.")


def layout_of(record: dict, cfg: InstructConfig) -> str | None:
    """The first layout all of whose fields the row has."""
    fields = {"prompt": (cfg.prompt_field, cfg.completion_field), "messages": ("messages",),
              "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
    return next((name for name, needed in fields.items()
                 if all(get_field(record, field) is not MISSING for field in needed)), None)


def _unknown_layout(record: dict, where: str, cfg: InstructConfig) -> UserError:
    present = ", ".join(f"'{name}'" for name in list(record)[:12]) or "no field at all"
    prompt = next((n for n in ("prompt", "instruction", "question", "input") if n in record), "FIELD")
    completion = next((n for n in ("completion", "response", "answer", "output") if n in record), "FIELD")
    return UserError(f"the row is none of {LAYOUTS}; it has {present}", where,
                     f"Try task.format=prompt task.prompt_field={prompt} task.completion_field={completion}.")


def _prompt(record: dict, where: str, cfg: InstructConfig) -> list[Message]:
    prompt = text_field(record, cfg.prompt_field, where, "task.prompt_field")
    return _pair(prompt, text_field(record, cfg.completion_field, where, "task.completion_field"))


def _alpaca(record: dict, where: str, cfg: InstructConfig) -> list[Message]:
    instruction = text_field(record, "instruction", where, "task.format=prompt task.prompt_field")
    output = text_field(record, "output", where, "task.format=prompt task.completion_field")
    extra = record.get("input")
    if extra is not None and not isinstance(extra, str):
        raise UserError(f"field 'input' is {json_type(extra)}, not a string", where, MEND)
    if not extra or not extra.strip():
        return _pair(instruction, output)
    messages = _pair(f"{instruction}\n\n{extra}", output)
    messages[0] |= {"instruction": instruction, "input": extra}
    return messages


def _pair(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _messages(record: dict, where: str, cfg: InstructConfig) -> list[Message]:
    return _turns(record, where, "messages", "role", "content", ROLES)


def _sharegpt(record: dict, where: str, cfg: InstructConfig) -> list[Message]:
    return _turns(record, where, "conversations", "from", "value", SHAREGPT_ROLES)


def _turns(record: dict, where: str, field: str, role_key: str, text_key: str, roles: dict[str, str]) -> list[Message]:
    turns = record.get(field, MISSING)
    if turns is MISSING:
        present = ", ".join(f"'{name}'" for name in list(record)[:12])
        raise UserError(f"field '{field}' is missing; this record has {present}", where, "Try task.format=auto.")
    if not isinstance(turns, list):
        raise UserError(f"field '{field}' is {json_type(turns)}, not an array", where, MEND)
    if not turns:
        raise UserError(f"field '{field}' is an empty array", where, MEND)
    return [_turn(turn, f"{field}[{i}]", where, role_key, text_key, roles) for i, turn in enumerate(turns)]


def _turn(turn: Any, name: str, where: str, role_key: str, text_key: str, roles: dict[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{name} is {json_type(turn)}, not an object", where, MEND)
    missing = [key for key in (role_key, text_key) if key not in turn]
    if missing:
        present = ", ".join(f"'{key}'" for key in turn) or "nothing"
        raise UserError(f"{name} has no '{missing[0]}'; it has {present}", where, MEND)
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        near = get_close_matches(str(role).lower(), roles, 1)
        hint = f"Perhaps '{near[0]}' was meant; {SKIP}" if near else f"Known are {', '.join(roles)}; {SKIP}"
        raise UserError(f"{name} has the unknown {role_key} {role!r}", where, hint)
    return {"role": roles[role], "content": full_text(turn[text_key], f"{name}.{text_key}", where)}


def _check_order(messages: list[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError("the conversation has no turn of the assistant: nothing can be scored", where, MEND)
    if "system" in roles[1:]:
        at = roles.index("system", 1)
        raise UserError(f"turn {at + 1} is a system message; only the first may be", where, MEND)
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[0] == "assistant":
        raise UserError("the conversation starts with the assistant: there is no prompt to answer", where, MEND)
    for i, (first, second) in enumerate(pairwise(turns)):
        if first == second:
            at = i + 1 + len(roles) - len(turns)
            raise UserError(f"turns {at} and {at + 1} are both of the {first}", where,
                            f"Join them into one, or mend their order; {SKIP}")


READERS: dict[str, Callable[[dict, str, InstructConfig], list[Message]]] = {
    "prompt": _prompt, "messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt}
