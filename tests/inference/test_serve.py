"""The endpoint over real HTTP on a real (tiny) model: OpenAI's shapes, streams, refusals, and OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from pathlib import Path

import pytest

from finetune.cli.app import compose_config
from finetune.cli.serve import run
from finetune.data.instruct_template import load_template
from finetune.errors import UserError
from finetune.inference.sample import Sampling, finished_text
from finetune.inference.serve_api import Limits
from finetune.inference.serve_http import Service, build_server
from finetune.inference.speaker import load_speaker

TOKEN = "a-token-of-sixteen-characters"


@pytest.fixture(scope="module")
def speaker(small_gptj: Path, tmp_path_factory):
    """A random model; as an instruction export it knows a template."""
    folder = tmp_path_factory.mktemp("served")
    for file in small_gptj.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "finetune.json").write_text(
        json.dumps(
            {
                "head": "lm",
                "dtype": "fp32",
                "base": "",
                "kind": "full",
                "settings": {"kind": "instruct"},
                "task": {
                    "template": "chat",
                    "template_text": load_template("chat", "<|endoftext|>").text,
                },
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def loaded(speaker):
    return load_speaker(str(speaker), None)


def start(loaded, token=None, **more):
    settings = {"limits": Limits(32, 4), "max_body": 5000, "concurrency": 2, "local": True} | more
    server = build_server(Service(loaded, "tiny", token, **settings), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server(loaded):
    server = start(loaded)
    yield server
    server.shutdown()


def call(server, path, body=None, method="POST", **headers):
    """(status, headers, bytes)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    headers = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    return answer.status, answer, answer.read()


def ask(server, path, **body):
    status, _, data = call(server, path, body)
    assert status == 200, data
    return json.loads(data)


def events(server, path, **body):
    status, answer, data = call(server, path, body | {"stream": True})
    assert status == 200 and answer.getheader("Content-Type").startswith("text/event-stream")
    lines = data.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def greedy(loaded, prompt, tokens):
    ids = loaded.continue_ids([loaded.ids(prompt, False)], Sampling(tokens, 0.0))[0]
    return finished_text(loaded.tokenizer, ids, ())


def test_completions(server, loaded):
    found = ask(
        server, "/v1/completions", model="tiny", prompt=["One", "Two"], max_tokens=6, temperature=0
    )
    assert found["object"] == "text_completion" and [c["index"] for c in found["choices"]] == [0, 1]
    assert [c["text"] for c in found["choices"]] == [greedy(loaded, p, 6) for p in ("One", "Two")]
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}


def test_seeds_and_several_choices(server):
    words = {"prompt": "Once upon", "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 5}
    first, again = (ask(server, "/v1/completions", **words)["choices"] for _ in range(2))
    assert first == again and len({c["text"] for c in first}) == 3


def test_stop_strings_cut_the_text(server, loaded):
    whole = greedy(loaded, "Once", 12)
    stop = whole[5:9]
    found = ask(server, "/v1/completions", prompt="Once", max_tokens=12, temperature=0, stop=stop)[
        "choices"
    ][0]
    assert found["text"] == whole[: whole.index(stop)] and found["finish_reason"] == "stop"
    parts = events(
        server, "/v1/completions", prompt="Once", max_tokens=12, temperature=0, stop=[stop]
    )
    assert "".join(p["choices"][0]["text"] for p in parts) == found["text"]


def test_streams_say_the_same(server, loaded):
    parts = events(
        server,
        "/v1/completions",
        prompt="Once",
        max_tokens=12,
        temperature=0,
        stream_options={"include_usage": True},
    )
    assert (
        len(parts) > 3
        and parts[-1]["usage"]["completion_tokens"] == 12
        and parts[-1]["choices"] == []
    )
    assert "".join(p["choices"][0]["text"] for p in parts[:-1]) == greedy(loaded, "Once", 12)
    assert [p["choices"][0]["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 2) + [
        "length"
    ]


def test_chat(server, loaded):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    found = ask(server, "/v1/chat/completions", messages=messages, max_tokens=5, temperature=0)
    wanted = greedy(loaded, "User: Hi\n\nAssistant:", 5)
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": wanted}
    parts = events(server, "/v1/chat/completions", messages=messages, max_tokens=5, temperature=0)
    assert (
        parts[0]["choices"][0]["delta"]["role"] == "assistant"
        and parts[0]["object"] == "chat.completion.chunk"
    )
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == wanted


def test_models_health_and_the_page(server):
    assert json.loads(call(server, "/v1/models", method="GET")[2])["data"][0]["id"] == "tiny"
    assert call(server, "/health", method="GET")[0] == 200
    status, answer, page = call(server, "/", method="GET")
    assert (
        status == 200
        and answer.getheader("Content-Type").startswith("text/html")
        and b"</html>" in page
    )


WRONG = {
    "no prompt": (400, {}),
    "too long": (400, {"prompt": "a", "max_tokens": 33}),
    "no list": (400, []),
    "beyond the positions": (400, {"prompt": "a " * 2100, "max_tokens": 5}),
    "too many": (400, {"prompt": "a", "n": 5}),
    "two streams": (400, {"prompt": ["a", "b"], "stream": True}),
    "temperature": (400, {"prompt": "a", "temperature": -1}),
    "text": (400, {"prompt": "a", "max_tokens": "many"}),
    "not supported": (400, {"prompt": "a", "logprobs": 5}),
    "no such id": (400, {"prompt": [60000]}),
    "other model": (404, {"model": "gpt-4", "prompt": "a"}),
    "not JSON": (400, b"{"),
    "stop": (400, {"prompt": "a", "stop": 5}),
    "penalty": (400, {"prompt": "a", "frequency_penalty": 2}),
    "other best": (400, {"prompt": "a", "n": 1, "best_of": 3}),
    "endless": (400, b'{"prompt": "a", "n": 1e999}'),
    "half a surrogate": (400, b'{"prompt": "\\ud800"}'),
    "in a stop": (400, b'{"prompt": "a", "stop": "\\udfff"}'),
    "huge": (400, b'{"prompt": "a", "n": 1' + b"0" * 400 + b"}"),
    "of the chosen token": (400, {"prompt": "a", "logprobs": 0}),
    "ids": (400, {"prompt": "a", "stop_token_ids": [5]}),
    "not a number": (400, b'{"prompt": "a", "max_tokens": NaN}'),
    "true is no number": (400, {"prompt": "a", "n": True}),
    "too large": (413, {"prompt": "a" * 6000}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused_in_openais_form(server, name):
    wanted, body = WRONG[name]
    status, _, data = call(server, "/v1/completions", body)
    error = json.loads(data)["error"]
    assert status == wanted and error["message"] and error["type"].endswith("_error"), data


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"prompt": "a", "max_tokens": 40}, "max_tokens=40"),
        ({"prompt": "a", "max_completion_tokens": 33}, "max_tokens=33"),
        ({"prompt": ["a", "b"], "n": 3}, "max_texts=6"),
        ({"prompt": "a" * 6000}, "max_body_bytes=60"),
    ],
)
def test_a_limit_names_the_key_that_raises_it(server, body, key):
    assert key in json.loads(call(server, "/v1/completions", body)[2])["error"]["message"]


def test_each_request_is_a_line_without_its_text(loaded, capsys):
    server = start(loaded)
    words = {"prompt": "x y z", "max_tokens": 4, "temperature": 0}
    size = len(loaded.ids(words["prompt"], False))
    requests = [
        ("/v1/completions", words),
        ("/v1/completions?key=hush", words | {"stream": True}),
        ("/v1/completions", words | {"max_tokens": 2000}),
        ("/nothing", words),
    ]
    assert [call(server, path, body)[0] for path, body in requests] == [200, 200, 400, 404]
    assert (
        call(server, "/health", method="GET")[0] == 200
        and call(server, "/", method="BREW")[0] == 501
    )
    said, deadline = "", time.monotonic() + 30
    while (
        said.count("\n") - said.count(" 413 ") < 6 and time.monotonic() < deadline
    ):  # a line follows its answer
        said += capsys.readouterr().err
        time.sleep(0.01)
    server.shutdown()
    assert sorted(
        re.sub(r"^[\d:]{8}  |[\d.]+ s$", "", line)
        for line in said.splitlines()
        if " 413 " not in line  # of the test before, whose line may come late
    ) == sorted(
        [
            f"POST /v1/completions  200  {size} + 4 tokens  ",
            f"POST /v1/completions  200  {size} + 4 tokens  ",
            "POST /v1/completions  400  ",
            "POST /nothing  404  ",
            "GET /health  200  ",
            "BREW /  501  ",
        ]
    )


def test_pages_of_other_origins_are_kept_out(server):
    body = {"prompt": "a"}
    assert call(server, "/v1/completions", body, Content_Type="text/plain")[0] == 415
    assert call(server, "/v1/completions", body, Host="evil.example:80")[0] == 403
    assert call(server, "/v1/completions", body, Host="[")[0] == 400
    assert call(server, "/v1/nothing", body)[0] == 404


def test_a_token_is_demanded(loaded):
    server = start(loaded, TOKEN)
    body = {"prompt": "a", "max_tokens": 1}
    assert call(server, "/v1/completions", body)[0] == 401
    assert call(server, "/v1/completions", body, Authorization="Bearer wrong")[0] == 401
    assert call(server, "/v1/models", method="GET")[0] == 401
    assert call(server, "/v1/completions", body, Authorization=f"Bearer {TOKEN}")[0] == 200
    server.shutdown()


def test_more_than_concurrency_are_turned_away(loaded):
    server = start(loaded, concurrency=1)
    service = server.RequestHandlerClass.service
    with service.model_lock:  # as a long request would
        waiting = threading.Thread(
            target=call, args=(server, "/v1/completions", {"prompt": "a", "max_tokens": 1})
        )
        waiting.start()
        while service.places._value:
            pass
        assert call(server, "/v1/completions", {"prompt": "b"})[0] == 429
    waiting.join(30)
    assert call(server, "/v1/completions", {"prompt": "b", "max_tokens": 1})[0] == 200
    server.shutdown()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["host=0.0.0.0"], "no token"),
        (["port=99999"], "port"),
        (["max_tokens=0"], "max_tokens"),
    ],
)
def test_wrong_starts_are_refused(speaker, words, message, monkeypatch):
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match=message):
        run(compose_config([f"model={speaker}", *words], "serve"))


def test_openais_client(server, loaded):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key="none", max_retries=0
    )
    assert [m.id for m in client.models.list()] == ["tiny"]
    wanted = greedy(loaded, "Once", 8)
    done = client.completions.create(model="tiny", prompt="Once", max_tokens=8, temperature=0)
    assert done.choices[0].text == wanted and done.usage.total_tokens == 9
    parts = client.completions.create(
        model="tiny", prompt="Once", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == wanted
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0
    )
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0, stream=True
    )
    said = "".join(part.choices[0].delta.content or "" for part in stream)
    assert said == chat.choices[0].message.content == greedy(loaded, "User: Hi\n\nAssistant:", 5)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="Once", max_tokens=5000)
