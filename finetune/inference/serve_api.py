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
"""Length of a completion where max_tokens is not given, as OpenAI has it."""
MOST = 10**9
"""Largest count that is read as a number; the server's own limits are far lower."""
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
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role of a message -> role in the template."""


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
            "this model was not trained on instructions: it has no chat template; use "
            "/v1/completions",
        )
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(400, "the body holds half of a surrogate pair, which is no text") from None

    # Parameters that are not there, unless their value asks for nothing.
    for name in REFUSED:
        value = body.get(name)
        # logprobs=0 asks for those of the chosen tokens.
        zero = name == "logprobs" and value is not None and value is not False
        if value not in NEUTRAL or zero:
            raise Refused(400, f"'{name}' is not supported", name)
    for name, same in (("best_of", body.get("n")), ("repetition_penalty", 1)):
        if body.get(name) not in (None, 1, same):
            raise Refused(400, f"'{name}' is not supported", name)

    prompts = [_chat_ids(body, speaker)] if chat else _prompt_ids(body, speaker)
    n = _number(body, "n", 1, int, 1, MOST)
    texts = len(prompts) * n
    if texts > limits.max_texts:
        raise Refused(
            400,
            f"{len(prompts)} prompts x n = {n} exceed the {limits.max_texts} texts that this "
            f"server allows; started with max_texts={texts} it allows them",
            "n",
        )
    if body.get("stream") not in (None, True, False):
        raise Refused(400, "'stream' must be true or false", "stream")
    stream = body.get("stream") is True
    if stream and texts > 1:
        raise Refused(400, "only one text can be streamed: one prompt, n = 1", "stream")
    options = body.get("stream_options") or {}
    usage = isinstance(options, dict) and options.get("include_usage") is True
    room = speaker.positions - max(map(len, prompts))
    samplings = _samplings(body, n, chat, room, limits)
    return Request(
        chat, [p for p in prompts for _ in range(n)], samplings * len(prompts), stream, usage
    )


def _samplings(body: Json, n: int, chat: bool, room: int, limits: Limits) -> list[Sampling]:
    """Return the sampling settings of the n texts of one prompt, each with a seed of its own.

    Args:
        room: positions that the longest prompt leaves.
    """
    # Length: by default what is left in a chat, a few tokens in a completion.
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    default = min(limits.max_tokens, max(room, 1) if chat else COMPLETION_TOKENS)
    new_tokens = _number(body, name, default, int, 1, MOST)
    if new_tokens > room:
        raise Refused(
            400, f"the prompt leaves room for {max(room, 0)} tokens, {name} = {new_tokens}", name
        )
    if new_tokens > limits.max_tokens:
        raise Refused(
            400,
            f"{name} = {new_tokens} exceeds the {limits.max_tokens} that this server allows; "
            f"started with max_tokens={new_tokens} it allows it",
            name,
        )

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
    if seed is None:
        seed = uuid.uuid4().int % 2**31
    elif not _is_int(seed):
        raise Refused(400, "'seed' must be an integer", "seed")
    temperature = _number(body, "temperature", 1.0, float, 0.0, 2.0)
    top_p = _number(body, "top_p", 1.0, float, 0.0, 1.0)
    if top_p == 0:  # the smallest set of tokens there is: the likeliest alone
        temperature, top_p = 0.0, 1.0
    return [
        Sampling(new_tokens, temperature, top_p, stop=stops, seed=seed + choice)
        for choice in range(n)
    ]


def _prompt_ids(body: Json, speaker: Speaker) -> list[list[int]]:
    """Return the ids of a completion's prompts: a text, texts, token ids, or lists of token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_int, prompt))):
        prompt = [prompt]
    wrong = Refused(400, "'prompt' must be a string, an array of strings, or token ids", "prompt")
    if not isinstance(prompt, list):
        raise wrong
    size = len(speaker.tokenizer)
    if speaker.limit:
        size = min(size, speaker.limit.rows)
    prompts = []
    for item in prompt:
        if isinstance(item, str):
            try:
                prompts.append(speaker.ids(item, chat=False))
            except UserError as error:
                raise Refused(400, error.problem, "prompt") from None
        elif isinstance(item, list) and item and all(_is_int(i) and 0 <= i < size for i in item):
            prompts.append(item)
        else:
            raise wrong
    return prompts


def _chat_ids(body: Json, speaker: Speaker) -> list[int]:
    """Return the ids of a conversation in the export's template."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "'messages' must be an array of messages", "messages")
    conversation = []
    for message in messages:
        role, content = None, None
        if isinstance(message, dict):
            role, content = message.get("role"), message.get("content")
        if isinstance(content, list):  # content parts, as newer clients send them
            parts = [
                part.get("text")
                for part in content
                if isinstance(part, dict) and part.get("type") == "text"
            ]
            texts = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
            content = "".join(parts) if texts else None
        if not isinstance(content, str) or role not in list(ROLES):
            raise Refused(
                400,
                "a message needs a role (system, user, assistant) and a text as content",
                "messages",
            )
        conversation.append({"role": ROLES[role], "content": content})
    if conversation[-1]["role"] == "assistant":
        raise Refused(400, "the last message must not be the assistant's", "messages")
    try:
        return speaker.ids(conversation, chat=True)
    except UserError as error:
        raise Refused(400, error.problem, "messages") from None


def _number(body: Json, name: str, default: Any, kind: type, low: float, high: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    number = isinstance(value, float) or _is_int(value)
    if not number or not -math.inf < value < math.inf or (kind is int and value != int(value)):
        raise Refused(400, f"'{name}' must be a number", name)
    if not low <= value <= high:
        raise Refused(400, f"'{name}' is outside {low} to {high}", name)
    return kind(value)


def _is_int(value: Any) -> bool:
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
        self.head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, speaker: Speaker) -> Json:
        """Generate everything and return the response object."""
        chat, choices = self.request.chat, []
        requests = zip(self.request.prompts, self.request.samplings, strict=True)
        for index, (prompt, how) in enumerate(requests):
            new = speaker.continue_ids([prompt], how)[0]
            self.new_tokens += len(new)
            text = finished_text(speaker.tokenizer, new, how.stop)
            content = (
                {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            )
            reason = finish(speaker, new, how)
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage()}

    def stream(self, speaker: Speaker, send: Callable[[Json], None]) -> None:
        """Generate, and send chunk objects as text becomes available."""
        chat, how = self.request.chat, self.request.samplings[0]
        kind = "chat.completion.chunk" if chat else "text_completion"

        def send_chunk(delta: Json, reason: str | None = None) -> None:
            content = {"delta": delta} if chat else {"text": delta.get("content", "")}
            choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
            send({**self.head, "object": kind, "choices": [choice]})

        if chat:
            send_chunk({"role": "assistant", "content": ""})
        streamer = Streamer(speaker.tokenizer, how.stop, lambda text: send_chunk({"content": text}))
        new = speaker.continue_ids(self.request.prompts, how, streamer)[0]
        self.new_tokens = len(new)
        send_chunk({}, finish(speaker, new, how))
        if self.request.include_usage:
            send({**self.head, "object": kind, "choices": [], "usage": self.usage()})

    def usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }


def finish(speaker: Speaker, ids: list[int], how: Sampling) -> str:
    """Return OpenAI's reason for the end of a text: "length" or "stop" (eos or a stop string)."""
    cut = len(finished_text(speaker.tokenizer, ids, how.stop)) < len(
        finished_text(speaker.tokenizer, ids, ())
    )
    return "length" if len(ids) >= how.max_new_tokens and not cut else "stop"
