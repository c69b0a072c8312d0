"""HTTP server around `serve_api`: routes, token, limits, server-sent events.

It uses the standard library's threaded server. One text is generated at a time; further requests
wait, and beyond `concurrency` they are rejected. It is meant for a few people who try a model out;
use vLLM for a service with many users (docs/export.md).
"""

from __future__ import annotations

import hmac
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.inference.serve_api import Json, Limits, Refused, Reply, read_request
from finetune.inference.speaker import Speaker

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SLOW_CLIENT_SECONDS = 30


@dataclass
class Service:
    """State that all requests share."""

    speaker: Speaker
    name: str
    """The model's name for clients."""
    token: str | None
    """Demanded as `Authorization: Bearer`; None: nothing is demanded."""
    limits: Limits
    max_body: int
    """Bytes."""
    concurrency: int
    """Requests that may wait or run at once."""
    local: bool
    """Answer only requests that name this machine as their host."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.places = threading.BoundedSemaphore(self.concurrency)
        self.model_lock = threading.Lock()


def build_server(service: Service, host: str, port: int) -> ThreadingHTTPServer:
    """Build a listening server; call `serve_forever` to answer requests.

    Raises:
        OSError: the address is in use.
    """
    kind = type("Handler", (Handler,), {"service": service})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = type(
        "Server", (ThreadingHTTPServer,), {"daemon_threads": True, "address_family": family}
    )
    return server((host, port), kind)


class Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"
    timeout = SLOW_CLIENT_SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Drop the standard library's log lines; `_log` writes one at the end of each request."""

    def send_response(self, code: int, message: str | None = None) -> None:
        self.status = code
        super().send_response(code, message)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not valid HTTP or has an unknown method."""
        self.reply, self.started = None, time.monotonic()
        super().send_error(code, message, explain)
        self._log()

    def _log(self, note: str = "") -> None:
        """Write time, method, path, status, tokens and seconds to stderr.

        No query, body or generated text is logged.
        """
        path = urlsplit(getattr(self, "path", None) or "-").path[:100]
        path = path.encode("unicode_escape").decode()
        tokens = ""
        if self.reply:
            tokens = f"{self.reply.prompt_tokens} + {self.reply.new_tokens} tokens  "
        seconds = time.monotonic() - self.started
        print(
            f"{time.strftime('%H:%M:%S')}  {self.command or '-'} {path}  {self.status}  "
            f"{tokens}{seconds:.2f} s{note}",
            file=sys.stderr,
            flush=True,
        )

    def _answer(self, answer: Callable[[str], None]) -> None:
        """Answer one request with `answer(path)`, and turn whatever it raises into a response."""
        self.began, self.status, self.reply = False, 0, None
        self.started, note = time.monotonic(), ""
        try:
            # Against DNS rebinding: a local server refuses requests for other host names.
            try:
                host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            except ValueError:
                raise Refused(400, "the Host header is not a host") from None
            if self.service.local and host not in LOOPBACK:
                raise Refused(403, "this server answers on this machine only")
            answer(urlsplit(self.path).path)
        except Refused as error:
            self._refuse(error)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection, note = True, "  the client went away"
        except Exception:
            traceback.print_exc()
            self._refuse(Refused(500, "the server failed; its own output says why"))
        finally:
            self._log(note)

    def _refuse(self, error: Refused) -> None:
        self.close_connection = True  # what is left of the body is not read
        if not self.began:
            self._send_json(error.status, error.body())

    def _get(self, path: str) -> None:
        if path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/health":
            self._send_json(200, {"status": "ok"})
        elif path in ("/v1/models", f"/v1/models/{self.service.name}"):
            self._check_token()
            model = {
                "id": self.service.name,
                "object": "model",
                "created": self.service.created,
                "owned_by": "finetune-gptj",
                "chat": self.service.speaker.chats,
            }
            listed = {"object": "list", "data": [model]}
            self._send_json(200, listed if path == "/v1/models" else model)
        else:
            raise Refused(404, f"there is nothing at {path[:100]}")

    def _post(self, path: str) -> None:
        if path not in ("/v1/completions", "/v1/chat/completions"):
            raise Refused(404, f"there is nothing at {path[:100]}")
        self._check_token()
        body, service = self._read_body(), self.service
        model = body.get("model") if isinstance(body, dict) else None
        if model not in (None, "", service.name):
            raise Refused(
                404, f"there is no model '{str(model)[:100]}'; this is '{service.name}'", "model"
            )
        request = read_request(body, path.startswith("/v1/chat"), service.speaker, service.limits)
        reply = self.reply = Reply(request, service.name)

        # The place is free again before the client sees the end of its answer, because it may send
        # the next request at once.
        if not request.stream:
            with self._turn():
                whole = reply.whole(service.speaker)
            self._send_json(200, whole)
            return
        with self._turn():
            self.began = self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
            reply.stream(
                service.speaker, lambda chunk: self._event(json.dumps(chunk, ensure_ascii=False))
            )
        self._event("[DONE]")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until the model is free; refuse if `concurrency` requests wait or run already."""
        service = self.service
        if not service.places.acquire(blocking=False):
            raise Refused(
                429,
                f"{service.concurrency} requests are waiting already, as many as this server "
                "allows (its key concurrency); try again later",
            )
        try:
            with service.model_lock:
                yield
        finally:
            service.places.release()

    def _check_token(self) -> None:
        if self.service.token is None:
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(token.encode(), self.service.token.encode()):
            raise Refused(401, "the token is missing or wrong: send 'Authorization: Bearer TOKEN'")

    def _read_body(self) -> Any:
        """Return the value of the request's JSON body, of at most `max_body` bytes."""
        # Requiring this type blocks pages of other origins: a browser sends a preflight request
        # first, which is not granted.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "send Content-Type: application/json")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(411, "send Content-Length") from None
        if length < 0:
            raise Refused(400, f"Content-Length is {length}")
        if length > self.service.max_body:
            raise Refused(
                413,
                f"the body has {length} bytes, {self.service.max_body} are allowed; started with "
                f"max_body_bytes={length} the server allows it",
            )
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None

    def _event(self, data: str) -> None:
        """Send one server-sent event."""
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _send_json(self, status: int, value: Json) -> None:
        self._send(status, "application/json", json.dumps(value, ensure_ascii=False).encode())

    def _send(self, status: int, content_type: str, data: bytes) -> None:
        self.began = True
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
