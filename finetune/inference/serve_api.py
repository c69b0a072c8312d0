"""Requests of OpenAI's completions interface: parsing, validation and responses, without HTTP.

body -> Request (prompts as ids, sampling) -> texts -> response objects, whole or in chunks.
https://platform.openai.com/docs/api-reference/completions and .../chat
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.inference.sample import Sampling, Streamer, finished_text
from finetune.inference.speaker import Speaker

Json = dict[str, Any]
COMPLETION_TOKENS = 16
"""What OpenAI's completions generate where max_tokens is not given."""
REFUSED = (
    "logprobs",
    "top_logprobs",
    "tools",
    "functions",
    "logit_bias",
    "response_format",
    "suffix",
    "echo",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "min_p",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
)
"""Parameters that would change the answer and are not implemented; refused when they ask for something."""
NEUTRAL = (None, 0, 0.0, False, "", [], {}, {"type": "text"})


class Refused(Exception):
    """Raised for a request that is answered with an error.

    Args:
        status: HTTP status.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> Json:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


@dataclass
class Request:
    """Prompts and sampling settings of one request."""

    chat: bool
    prompts: list[list[int]]
    """Token ids, one list for each text that is returned (a prompt with n=2 stands twice)."""
    samplings: list[Sampling]
    stream: bool
    include_usage: bool


@dataclass
class Limits:
    """Upper limits for one request."""

    max_tokens: int
    """New tokens of one text."""
    max_texts: int
    """Prompts times n."""


def read_request(body: Any, chat: bool, speaker: Speaker, limits: Limits) -> Request:
    """Parse and validate the body of a request.

    Raises:
        Refused: a field is missing, wrong, too large or not supported.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    if chat and not speaker.chats:
        raise Refused(
            400,
            "this model was not trained on instructions: it has no chat template; use /v1/completions",
        )
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(400, "the body holds half of a surrogate pair, which is no text") from None
    for name in REFUSED:
        if _asks(name, body.get(name)):
            raise Refused(400, f"'{name}' is not supported", name)
    prompts = [_chat_ids(body, speaker)] if chat else _prompt_ids(body, speaker)
    for name in ("best_of", "repetition_penalty"):
        if body.get(name) not in (None, 1, body.get("n") if name == "best_of" else 1):
            raise Refused(400, f"'{name}' is not supported", name)
    n = _number(body, "n", 1, int, 1, 10**9)
    if len(prompts) * n > limits.max_texts:
        raise Refused(
            400,
            f"{len(prompts)} prompts x n = {n} exceed the {limits.max_texts} texts that this server "
            f"allows; started with max_texts={len(prompts) * n} it allows them",
            "n",
        )
    stream = _flag(body, "stream")
    if stream and len(prompts) * n > 1:
        raise Refused(400, "only one text can be streamed: one prompt, n = 1", "stream")
    room = speaker.positions - max(map(len, prompts))
    new = _new_tokens(body, chat, room, limits)
    how = [_sampling(body, new, i) for i in range(n)]
    options = body.get("stream_options") or {}
    usage = isinstance(options, dict) and options.get("include_usage") is True
    return Request(chat, [p for p in prompts for _ in range(n)], how * len(prompts), stream, usage)


def _asks(name: str, value: Any) -> bool:
    """Tell whether a parameter requests anything.

    `logprobs=0` does: it requests those of the chosen tokens.
    """
    return value not in NEUTRAL or (name == "logprobs" and value is not None and value is not False)


def _new_tokens(body: Json, chat: bool, room: int, limits: Limits) -> int:
    name = (
        "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    )
    default = (
        min(limits.max_tokens, max(room, 1)) if chat else min(COMPLETION_TOKENS, limits.max_tokens)
    )
    new = _number(body, name, default, int, 1, 10**9)
    if new > room:
        raise Refused(
            400, f"the prompt leaves room for {max(room, 0)} tokens, {name} = {new}", name
        )
    if new > limits.max_tokens:
        raise Refused(
            400,
            f"{name} = {new} exceeds the {limits.max_tokens} that this server allows; "
            f"started with max_tokens={new} it allows it",
            name,
        )
    return new


def _sampling(body: Json, new: int, choice: int) -> Sampling:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    fitting = isinstance(stops, list) and all(
        isinstance(s, str) and 0 < len(s) <= 200 for s in stops
    )
    if not fitting or len(stops) > 4:
        raise Refused(
            400, "'stop' must be a string or at most 4 strings of at most 200 characters", "stop"
        )
    seed = body.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise Refused(400, "'seed' must be an integer", "seed")
    seed = uuid.uuid4().int % 2**31 if seed is None else seed
    temperature = _number(body, "temperature", 1.0, float, 0.0, 2.0)
    top_p = _number(body, "top_p", 1.0, float, 0.0, 1.0)
    return Sampling(
        new, temperature if top_p > 0 else 0.0, top_p or 1.0, stop=stops, seed=seed + choice
    )


def _prompt_ids(body: Json, speaker: Speaker) -> list[list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and prompt and all(_is_id(p) for p in prompt)
    ):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused(400, "'prompt' must be a string, an array of strings, or token ids", "prompt")
    size = (
        min(len(speaker.tokenizer), speaker.limit.rows) if speaker.limit else len(speaker.tokenizer)
    )
    found = []
    for item in prompt:
        if isinstance(item, str):
            try:
                found.append(speaker.ids(item, chat=False))
            except UserError as error:
                raise Refused(400, error.problem, "prompt") from None
        elif isinstance(item, list) and item and all(_is_id(i) and 0 <= i < size for i in item):
            found.append(item)
        else:
            raise Refused(
                400, "'prompt' must be a string, an array of strings, or token ids", "prompt"
            )
    return found


def _chat_ids(body: Json, speaker: Speaker) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "'messages' must be an array of messages", "messages")
    conversation = [_message(message) for message in messages]
    if conversation[-1]["role"] == "assistant":
        raise Refused(400, "the last message must not be the assistant's", "messages")
    try:
        return speaker.ids(conversation, chat=True)
    except UserError as error:
        raise Refused(400, error.problem, "messages") from None


def _message(message: Any) -> dict[str, str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):  # content parts, as newer clients send them
        parts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type") == "text"
        ]
        content = (
            "".join(parts)
            if len(parts) == len(content) and all(isinstance(p, str) for p in parts)
            else None
        )
    if not isinstance(content, str) or message.get("role") not in (
        "system",
        "developer",
        "user",
        "assistant",
    ):
        raise Refused(
            400,
            "a message needs a role (system, user, assistant) and a text as content",
            "messages",
        )
    return {
        "role": "system" if message["role"] == "developer" else message["role"],
        "content": content,
    }


def _number(body: Json, name: str, default: Any, kind: type, low: float, high: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    number = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -math.inf < value < math.inf
    )
    if not number or (kind is int and value != int(value)):
        raise Refused(400, f"'{name}' must be a number", name)
    if not low <= value <= high:
        raise Refused(400, f"'{name}' is outside {low} to {high}", name)
    return kind(value)


def _flag(body: Json, name: str) -> bool:
    if body.get(name) not in (None, True, False):
        raise Refused(400, f"'{name}' must be true or false", name)
    return body.get(name) is True


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Reply:
    """Builder of the response objects of one request.

    Args:
        model: the name that clients see.
    """

    def __init__(self, request: Request, model: str):
        self.request = request
        self.prompt_tokens = sum(map(len, request.prompts))
        self.new_tokens = 0
        """Tokens generated so far, of all texts."""
        self.kind = "chat.completion" if request.chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, speaker: Speaker) -> Json:
        """Generate everything and return the response object."""
        choices = []
        for i, (ids, how) in enumerate(
            zip(self.request.prompts, self.request.samplings, strict=True)
        ):
            found = speaker.continue_ids([ids], how)[0]
            self.new_tokens += len(found)
            text = finished_text(speaker.tokenizer, found, how.stop)
            choices.append(self._choice(i, text, finish(speaker, found, how)))
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def stream(self, speaker: Speaker, send: Callable[[Json], None]) -> None:
        """Generate, and send chunk objects as text becomes available."""
        ids, how = self.request.prompts[0], self.request.samplings[0]
        if self.request.chat:
            send(self._chunk({"role": "assistant", "content": ""}, None))
        streamer = Streamer(
            speaker.tokenizer, how.stop, lambda text: send(self._chunk(self._delta(text), None))
        )
        found = speaker.continue_ids([ids], how, streamer)[0]
        self.new_tokens = len(found)
        send(self._chunk({} if self.request.chat else self._delta(""), finish(speaker, found, how)))
        if self.request.include_usage:
            send({**self.head, "object": self._chunk_kind(), "choices": [], "usage": self.usage()})

    def usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }

    def _choice(self, index: int, text: str, reason: str) -> Json:
        content = (
            {"message": {"role": "assistant", "content": text}}
            if self.request.chat
            else {"text": text}
        )
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _delta(self, text: str) -> Json:
        return {"content": text}

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.request.chat else "text_completion"

    def _chunk(self, delta: Json, reason: str | None) -> Json:
        content = {"delta": delta} if self.request.chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self.head, "object": self._chunk_kind(), "choices": [choice]}


def finish(speaker: Speaker, ids: list[int], how: Sampling) -> str:
    """Return OpenAI's reason for the end of a text: "length" or "stop" (eos or a stop string)."""
    cut = len(finished_text(speaker.tokenizer, ids, how.stop)) < len(
        finished_text(speaker.tokenizer, ids, ())
    )
    return "length" if len(ids) >= how.max_new_tokens and not cut else "stop"
