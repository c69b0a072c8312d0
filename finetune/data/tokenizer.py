"""GPT-J's tokenizer: GPT-2's BPE plus 143 extra tokens, 50400 entries like the embedding.

Flow: a directory or hub id with a tokenizer -> AutoTokenizer; anything else -> built from the two BPE files that
ship with the project. Never resizes a vocabulary and adds no pad token: masks go by position, not by id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.assets.paths import asset, resolve
from finetune.errors import UserError
from finetune.files import read_json, refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRA_TOKENS = 143
POSITIONS = 2048
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")
SIDE_FILES = ("merges.txt", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, or GPT-J's own where `path` is None or a directory without one.

    Raises:
        UserError: a hub id that cannot be reached, unreadable tokenizer files, or a tokenizer without eos.
    """
    path = None if path is None else resolve(str(path))
    if path is None or (Path(path).is_dir() and not _has_tokenizer(Path(path))):
        return build_gptj_tokenizer()
    for name in (*TOKENIZER_FILES, *SIDE_FILES):
        refuse_pointer(Path(path).expanduser() / name)
    tokenizer = _load_auto(path)
    missing = "eos token, which separates documents" if tokenizer.eos_token_id is None else None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        missing = "fast form (tokenizer.json)"
    if missing:
        raise UserError(
            f"this tokenizer has no {missing}",
            path,
            "Try model.tokenizer=null for the tokenizer of GPT-J that ships with the project.",
        )
    return tokenizer


def build_gptj_tokenizer() -> PreTrainedTokenizerBase:
    """GPT-J's tokenizer from `encoder.json` and `vocab.bpe`: 50257 entries and `<|extratoken_1..143|>`."""
    from tokenizers import AddedToken
    from transformers import GPT2Tokenizer

    folder = asset("tokenizer")
    vocab = read_json(folder / "encoder.json")
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1:] if line]
    # `vocab_file=`/`merges_file=` are accepted too, and silently give an empty tokenizer in transformers 5.
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=POSITIONS)
    # normalized and not special, as in the published checkpoint's tokenizer.
    names = (f"<|extratoken_{i}|>" for i in range(1, EXTRA_TOKENS + 1))
    extra: list[Any] = [AddedToken(name, normalized=True, special=False) for name in names]
    tokenizer.add_tokens(extra)
    assert len(tokenizer) == len(vocab) + EXTRA_TOKENS
    return tokenizer


def backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers.Tokenizer` inside."""
    return cast(Any, tokenizer).backend_tokenizer


class TokenLimit:
    """The rows of a model's embedding, where its tokenizer has ids beyond them: texts that hold such a token are refused.

    Args:
        rows: vocab_size of the model.
        remedy: what the user can do instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, remedy: str):
        self.tokenizer, self.rows, self.remedy = tokenizer, rows, remedy

    def check(self, ids: Iterable[int], where: str) -> None:
        """
        Raises:
            UserError: one of the ids has no row.
        """
        beyond = next((int(token) for token in ids if token >= self.rows), None)
        if beyond is not None:
            raise UserError(
                f"the tokenizer's {self.tokenizer.convert_ids_to_tokens(beyond)!r} has id {beyond}, and the "
                f"model's embedding has {self.rows} rows, 0 to {self.rows - 1}",
                where,
                self.remedy,
            )


def token_limit(tokenizer: PreTrainedTokenizerBase, rows: int, remedy: str) -> TokenLimit | None:
    """The check that texts need before the model reads them; None where every id of the tokenizer has a row."""
    return (
        TokenLimit(tokenizer, rows, remedy) if max(tokenizer.get_vocab().values()) >= rows else None
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text gets."""
    return _fingerprint(backend(tokenizer).to_str(), tokenizer.eos_token_id, len(tokenizer))


@lru_cache(maxsize=4)
def _fingerprint(serialized: str, eos: int, size: int) -> str:
    state = json.loads(serialized)
    # A call such as tokenizer(text, truncation=True) leaves its arguments in the backend.
    state.update(truncation=None, padding=None, eos=eos, size=size)
    text = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _load_auto(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError or tokenizers' bare Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no tokenizer can be loaded from here ({type(error).__name__}: {reason})",
            path,
            "Give a directory with tokenizer.json, or model.tokenizer=null for the tokenizer of GPT-J that "
            "ships with the project; a hub id needs the network or a filled Hugging Face cache.",
        ) from None
