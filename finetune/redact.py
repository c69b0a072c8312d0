"""Secrets out of everything that leaves the process: configs, command lines, texts.

`redact` walks plain values; a secret is known by its key ("hf_token", "api_key", "password") or by its looks
("hf_...", "sk-...", 40 hex digits, a password in a URL). "tokenizer", "max_new_tokens", "eos_token" and the
commit of a model are innocent. A net with known holes, so keep secrets in the environment all the same.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

HIDDEN = "***"

SECRET_WORDS = frozenset({"password", "passwd", "passphrase", "secret", "secrets", "apikey", "authorization", "auth",
                          "credential", "credentials", "bearer", "cookie"})
KEYS_OF = ("api", "access", "private", "secret", "account", "ssh", "encryption", "signing", "wandb", "hf",
           "hub", "openai")
SECRET_PAIRS = frozenset((owner, "key") for owner in KEYS_OF)
VOCABULARY = frozenset({"eos", "bos", "pad", "unk", "mask", "sep", "cls", "special", "extra", "image", "stop", "per"})
"""Words before "token" that speak of a vocabulary, not of an account."""
HASH_KEYS = frozenset({"revision", "commit", "sha", "sha1", "hash", "fingerprint", "checksum"})

WELL_KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bwandb_v\d_\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abp]-[\w-]{10,}|\b[Bb]earer\s+[\w.~+/=-]{16,}")
HEX_KEY = re.compile(r"(?<![0-9A-Za-z/])[0-9a-f]{40}(?![0-9A-Za-z])")
"""Behind a slash it is part of a path: the hub's cache names its snapshots so."""
URL_PASSWORD = re.compile(r"(://)[^/\s@]+@")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def redact(value: Any, key: str = "") -> Any:
    """A copy with every secret replaced by `***`; `key` is the name that `value` stands under."""
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
    """`text` with well-known keys and URL passwords replaced; 40 hex digits stay where `key` names a hash."""
    text = URL_PASSWORD.sub(rf"\1{HIDDEN}@", WELL_KNOWN.sub(HIDDEN, text))
    words = set(_words(key))
    return text if words & HASH_KEYS else HEX_KEY.sub(HIDDEN, text)


def redact_words(argv: list[str]) -> list[str]:
    """A command line for the record: `key=value`, `--key value` and loose words."""
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


def is_secret_key(key: str) -> bool:
    """Whether what stands under `key` is a secret by its name; of a dotted path the last part decides."""
    words = _words(key.rpartition(".")[2])
    if SECRET_WORDS & set(words) or SECRET_PAIRS & set(pairwise(words)):
        return True
    is_token = bool(words) and words[-1] == "token"
    return is_token and not VOCABULARY & set(words)


def _words(key: str) -> list[str]:
    """`wandbApiKey` and `wandb-api_key` -> wandb, api, key."""
    return [word.lower() for word in WORD.findall(key)]
