"""Secrets in configs, command lines and texts: refused where they would be kept, hidden where they would be shown.

A secret is known by its key ("hf_token", "api_key", "password") or by its looks: the random part of "hf_..." or
"sk-...", a password or token in a URL, 40 hex digits that stand alone. "tokenizer", "max_new_tokens", a commit, a
file named by its hash and a folder "sk-learn-reviews-2024" are innocent.

`secret_problems` refuses what a run would write into config.yaml, which is read back and therefore never altered.
`redact` is for what leaves the process: the terminal, trackers, error texts. Both are nets with known holes, so keep
secrets in the environment all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from finetune.errors import UserError

HIDDEN = "***"

SECRET_WORDS = frozenset(
    {
        "password",
        "passwd",
        "passphrase",
        "secret",
        "secrets",
        "apikey",
        "authorization",
        "auth",
        "credential",
        "credentials",
        "bearer",
        "cookie",
    }
)
KEYS_OF = (
    "api",
    "access",
    "private",
    "secret",
    "account",
    "ssh",
    "encryption",
    "signing",
    "wandb",
    "hf",
    "hub",
    "openai",
)
SECRET_PAIRS = frozenset((owner, "key") for owner in KEYS_OF)
VOCABULARY = frozenset(
    {"eos", "bos", "pad", "unk", "mask", "sep", "cls", "special", "extra", "image", "stop", "per"}
)
"""Words before "token" that speak of a vocabulary, not of an account."""
HASH_KEYS = frozenset({"revision", "commit", "sha", "sha1", "hash", "fingerprint", "checksum"})
PATH_KEYS = frozenset(
    {
        "path",
        "train",
        "eval",
        "tokenizer",
        "template",
        "resume",
        "run",
        "runs",
        "dir",
        "out",
        "model",
        "source",
        "target",
        "prompts",
        "picture",
        "base",
    }
)
"""Words in keys of files, folders and hub ids: 40 hex digits are a name there."""
SIGNATURES = frozenset({"sig", "signature", "x-amz-signature", "x-goog-signature"})
"""Query parameters of a URL that let anyone read what it names."""

TOKEN = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|wandb_v\d_|xox[abp]-|[Bb]earer\s+)([\w.~+/=-]{10,})|\b(AKIA)[0-9A-Z]{16}\b"
)
HEX_KEY = re.compile(r"(?<![\w./\\-])[0-9a-f]{40}(?![\w/\\-]|\.\w)")
"""Alone: as part of a path or a file name it is a hash."""
USER_INFO = re.compile(r"(\w:/{1,2})([^/\s@]+)@")
"""One slash is what is left of a URL that was taken for a path."""
QUERY = re.compile(r"([?&]([\w.-]+)=)([^&\s'\"]+)")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def redact(value: Any, key: str = "") -> Any:
    """Return a copy with every secret replaced by `***`; `key` is the name that `value` stands under."""
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret_key(key):
        return HIDDEN
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    return redact_text(value, key) if isinstance(value, str) else value


def redact_text(text: str, key: str = "") -> str:
    """Hide tokens, and what a URL lets in with; 40 hex digits stay where `key` names a hash or a path."""
    text = USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = QUERY.sub(lambda found: f"{found[1]}{HIDDEN}" if _opens(found[2]) else found[0], text)
    text = TOKEN.sub(lambda found: HIDDEN if _is_token(found) else found[0], text)
    return text if set(_words(key)) & (HASH_KEYS | PATH_KEYS) else HEX_KEY.sub(HIDDEN, text)


def redact_words(argv: list[str]) -> list[str]:
    """A command line as it may be shown: `key=value`, `--key value` and loose words."""
    shown: list[str] = []
    for position, word in enumerate(argv):
        key, separator, value = word.partition("=")
        before = argv[position - 1] if position else ""
        if separator:
            shown.append(f"{key}={redact(value, key)}")
        elif before.startswith("--") and "=" not in before and is_secret_key(before):
            shown.append(HIDDEN)
        else:
            shown.append(redact_text(word))
    return shown


def secret_problems(value: Any, key: str = "") -> Iterator[UserError]:
    """The secrets of a config or of a part of it, each by its dotted key and without its text."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secret_problems(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secret_problems(item, key)
    elif isinstance(value, str) and (secret := _kind_of_secret(value, key)):
        yield UserError(
            f"the value holds {secret}, and a run's files keep every setting",
            key,
            "Give secrets in the environment: HF_TOKEN=... or WANDB_API_KEY=... before the command. "
            "Download data and models that need a login first, and name the local path.",
        )


def _kind_of_secret(text: str, key: str) -> str:
    """Words for a secret that must not be written down, "" where there is none.

    `redact_text` may hide a name too many; here a user name in a URL and 40 hex digits count only where they can be
    nothing else.
    """
    if any(":" in found[2] or len(found[2]) >= 20 for found in USER_INFO.finditer(text)):
        return "a URL with a password or a token in it"
    if any(_opens(found[2]) for found in QUERY.finditer(text)):
        return "a URL that is signed, or has a token in it"
    for found in TOKEN.finditer(text):
        if _is_token(found):
            return f"what looks like an access token ('{(found[1] or found[3]).strip()}...')"
    return (
        "40 hex digits, as wandb's API keys have them"
        if "wandb" in _words(key) and HEX_KEY.search(text)
        else ""
    )


def _is_token(found: re.Match[str]) -> bool:
    """Tell a random piece of text behind a known beginning, as tokens are, from a name made of words and dates."""
    if found[3]:
        return True
    if found[1].lower().startswith(("bearer", "xox")):
        return any(character.isdigit() for character in found[2])
    runs = re.findall(r"[A-Za-z0-9]{16,}", found[2])
    return any(
        re.search("[a-z]", run) and re.search("[A-Z]", run) and re.search("[0-9]", run)
        for run in runs
    )


def _opens(parameter: str) -> bool:
    """Tell the query parameters of a URL that are secrets by their names."""
    return parameter.lower() in SIGNATURES or is_secret_key(parameter)


def is_secret_key(key: str) -> bool:
    """Tell keys of secrets by their names; of a dotted path the last part decides."""
    words = _words(key.rpartition(".")[2])
    if SECRET_WORDS & set(words) or SECRET_PAIRS & set(pairwise(words)):
        return True
    is_token = bool(words) and words[-1] == "token"
    return is_token and not VOCABULARY & set(words)


def _words(key: str) -> list[str]:
    """`wandbApiKey` and `wandb-api_key` -> wandb, api, key."""
    return [word.lower() for word in WORD.findall(key)]
