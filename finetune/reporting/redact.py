"""Secrets in configs, command lines and texts: refused where they would be kept, hidden where they would be shown.

A secret is known by its key ("hf_token", "api_key", "password") or by its looks: the random part of "hf_..." or
"sk-...", a password or token in a URL, 40 hex digits that stand alone. "tokenizer", "max_new_tokens", a commit, a
file named by its hash and a folder "sk-learn-reviews-2024" are innocent.

`refuse_secrets` refuses what a run would write into config.yaml, which is read back and therefore never altered.
`redact` is for what leaves the process: the terminal, trackers, error texts. Both are nets with known holes, so keep
secrets in the environment all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from finetune.errors import UserError, problems_error

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
    """Hide tokens and the secret parts of URLs; 40 hex digits stay where `key` names a hash or a path."""
    text = USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = QUERY.sub(lambda m: f"{m[1]}{HIDDEN}" if _is_secret_parameter(m[2]) else m[0], text)
    text = TOKEN.sub(lambda m: HIDDEN if _is_token(m) else m[0], text)
    return text if set(_words(key)) & (HASH_KEYS | PATH_KEYS) else HEX_KEY.sub(HIDDEN, text)


def redact_words(argv: list[str]) -> list[str]:
    """Redact a command line of `key=value`, `--key value` and loose words."""
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


def refuse_secrets(values: dict[str, Any], title: str) -> None:
    """Raise one UserError that names the key of every secret among the settings."""
    if problems := list(secret_problems(values)):
        raise problems_error(title, problems)


def secret_problems(value: Any, key: str = "") -> Iterator[UserError]:
    """Yield a problem for each secret in a config or a part of it, by its dotted key and without its text.

    `redact_text` may hide a name too many; here a user name in a URL and 40 hex digits count only where
    they can be nothing else.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secret_problems(item, f"{key}.{name}" if key else str(name))
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from secret_problems(item, key)
        return
    if not isinstance(value, str):
        return
    token = next((m for m in TOKEN.finditer(value) if _is_token(m)), None)
    if any(":" in m[2] or len(m[2]) >= 20 for m in USER_INFO.finditer(value)):
        secret = "a URL with a password or a token in it"
    elif any(_is_secret_parameter(m[2]) for m in QUERY.finditer(value)):
        secret = "a URL that is signed, or has a token in it"
    elif token:
        secret = f"what looks like an access token ('{(token[1] or token[3]).strip()}...')"
    elif "wandb" in _words(key) and HEX_KEY.search(value):
        secret = "40 hex digits, as wandb's API keys have them"
    else:
        return
    yield UserError(
        f"the value holds {secret}, and a run's files keep every setting",
        key,
        "Give secrets in the environment: HF_TOKEN=... or WANDB_API_KEY=... before the command. "
        "Download data and models that need a login first, and name the local path.",
    )


def is_secret_key(key: str) -> bool:
    """Tell keys of secrets by their names; of a dotted path the last part decides."""
    words = _words(key.rpartition(".")[2])
    if SECRET_WORDS & set(words) or SECRET_PAIRS & set(pairwise(words)):
        return True
    return words[-1:] == ["token"] and not VOCABULARY & set(words)


def _is_secret_parameter(name: str) -> bool:
    return name.lower() in SIGNATURES or is_secret_key(name)


def _is_token(match: re.Match[str]) -> bool:
    """Tell a random piece of text behind a known beginning from a name made of words and dates."""
    if match[3]:
        return True
    if match[1].lower().startswith(("bearer", "xox")):
        return any(character.isdigit() for character in match[2])
    runs = re.findall(r"[A-Za-z0-9]{16,}", match[2])
    return any(all(re.search(kind, run) for kind in ("[a-z]", "[A-Z]", "[0-9]")) for run in runs)


def _words(key: str) -> list[str]:
    """Split a name: `wandbApiKey` and `wandb-api_key` give wandb, api, key."""
    return [word.lower() for word in WORD.findall(key)]
