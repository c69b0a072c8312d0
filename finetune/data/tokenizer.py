"""GPT-J's tokenizer: GPT-2's BPE plus 143 extra tokens, 50400 entries like the embedding.

Flow: a directory or hub id with a tokenizer -> AutoTokenizer; anything else -> built from the two BPE files that
ship with the project. Never resizes a vocabulary and adds no pad token: masks go by position, not by id. A task's own
tokens are new names of spare entries.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.assets.paths import asset, resolve
from finetune.config import TaskConfig, own_tokens, template_tokens
from finetune.errors import UserError
from finetune.files import read_json, refuse_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

EXTRA_TOKENS = 143
SPARE = re.compile(r"<\|extratoken_\d+\|>")
"""Names of entries that stand for no text: GPT-J's embedding has more rows than GPT-2's BPE has tokens."""
POSITIONS = 2048
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")
SIDE_FILES = ("merges.txt", "special_tokens_map.json", "added_tokens.json")
PIECE_CHARACTERS = 1 << 15
GROUP_CHARACTERS = 4 << 20
CACHED_WORDS = 200_000
# A space or newline behind a letter or digit starts a new word of GPT-2's pattern, whatever stands
# before or after.
WORD_END = re.compile(r"[^\W_](?=[ \n])")


def load_tokenizer(path: str | None, task: TaskConfig | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer at `path`, or GPT-J's own if it is None or a directory without one.

    Args:
        task: its own tokens are named, see `name_tokens`.

    Raises:
        UserError: a hub id that cannot be reached, unreadable tokenizer files, or a tokenizer without eos.
    """
    path = None if path is None else resolve(str(path))
    if path is None or (
        Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
    ):
        return name_tokens(build_gptj_tokenizer(), task)
    for name in (*TOKENIZER_FILES, *SIDE_FILES):
        refuse_pointer(Path(path).expanduser() / name)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # transformers raises OSError, ValueError, KeyError or tokenizers' bare Exception.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no tokenizer can be loaded from here ({type(error).__name__}: {reason})",
            path,
            "Give a directory with tokenizer.json, or model.tokenizer=null for the tokenizer of "
            "GPT-J that "
            "ships with the project; a hub id needs the network or a filled Hugging Face cache.",
        ) from None
    missing = "eos token, which separates documents" if tokenizer.eos_token_id is None else None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        missing = "fast form (tokenizer.json)"
    if missing:
        raise UserError(
            f"this tokenizer has no {missing}",
            path,
            "Try model.tokenizer=null for the tokenizer of GPT-J that ships with the project.",
        )
    return name_tokens(tokenizer, task)


def build_gptj_tokenizer() -> PreTrainedTokenizerBase:
    """Build GPT-J's tokenizer from `encoder.json` and `vocab.bpe`: 50257 entries and `<|extratoken_1..143|>`."""
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


def name_tokens(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig | None
) -> PreTrainedTokenizerBase:
    """Give a task's own tokens the names of spare entries, in order, and return the tokenizer.

    Tokens that it has already, as the tokenizer of an export does, stay as they are. If no spare
    entry is left, the vocabulary grows: `token_problems` finds out whether the model has rows for
    that. The template's tokens become special, so that decoded answers leave them out, and the last
    of them becomes the eos, which ends turns.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in (own_tokens(task) if task else ()) if name not in vocabulary]
    marks = template_tokens(task) if task else ()
    if missing:
        from tokenizers import AddedToken, Tokenizer

        state = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        names = dict(zip(spare_tokens(tokenizer), missing, strict=False))
        entries = state["model"]["vocab"]
        for token in state["added_tokens"]:
            if name := names.get(token["content"]):
                token |= {"content": name, "normalized": False, "special": name in marks}
        for spare, name in names.items():
            if spare in entries:
                entries[name] = entries.pop(spare)
        cast(Any, tokenizer)._tokenizer = Tokenizer.from_str(json.dumps(state))
        new = [
            AddedToken(name, normalized=False, special=name in marks)
            for name in missing[len(names) :]
        ]
        tokenizer.add_tokens(cast(Any, new))
    if marks:
        tokenizer.eos_token = marks[-1]
    return tokenizer


def spare_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of the entries that stand for no text, by id."""
    vocabulary = tokenizer.get_vocab()
    return sorted(filter(SPARE.fullmatch, vocabulary), key=vocabulary.__getitem__)


def token_ids(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> dict[str, int]:
    """Return a task's own tokens and their ids."""
    vocabulary = tokenizer.get_vocab()
    return {name: vocabulary[name] for name in own_tokens(task)}


def token_problems(path: str | None, task: TaskConfig, rows: int) -> Iterator[UserError]:
    """Yield why the tokenizer at `path` cannot name a task's own tokens.

    Args:
        rows: of the model's embedding.
    """
    tokens = own_tokens(task)
    vocabulary = load_tokenizer(path).get_vocab() if tokens else {}
    brought = template_tokens(task)
    if taken := [name for name in tokens if name in vocabulary and name not in brought]:
        ids = ", ".join(f"{name!r} ({vocabulary[name]})" for name in taken)
        yield UserError(
            f"the tokenizer has {ids} already",
            "task.tokens",
            "Leave it out, since it is a token in any case, or choose another name.",
        )
    spare = sum(bool(SPARE.fullmatch(name)) for name in vocabulary)
    spare += max(0, rows - len(vocabulary))
    if len(missing := [name for name in tokens if name not in vocabulary]) > spare:
        yield UserError(
            f"{len(missing)} tokens of your own need as many spare rows, and this model has "
            f"{spare}",
            "task.tokens",
            f"Name at most {spare}.",
        )


def ids_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the smallest type that holds every id; GPT-J's 50400 fit 16 bits."""
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


class TextTokenizer:
    """Encode texts to ids with the tokenizer's own threads, also within one long text.

    Special tokens are not added. Works on a copy of the tokenizer, because truncation and padding
    that others set on the original would silently cut documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    @cached_property
    def backend(self) -> Tokenizer:
        """The copy, made on first use: an encoder whose data are in the cache never needs it."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(cast(Any, self._tokenizer).backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        # BPE caches the first 10000 words it meets and none after them. A cache of 200000 saves a
        # fifth of the time on English. The method is private, hence optional: without it the ids
        # are the same.
        if hasattr(copy.model, "_resize_cache"):
            copy.model._resize_cache(CACHED_WORDS)
        return copy

    @cached_property
    def _divisible(self) -> bool:
        """Tell whether a text may be cut before a space without changing its ids.

        This holds for GPT-2's byte-level pattern without normalisation.
        """
        split = self.backend.pre_tokenizer
        added = self.backend.get_added_tokens_decoder().values()
        return (
            type(split).__name__ == "ByteLevel"
            and self.backend.normalizer is None
            and not split.add_prefix_space
            and split.use_regex
            and not any(
                t.lstrip or t.rstrip or " " in t.content or "\n" in t.content for t in added
            )
        )

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if not self._divisible or max(map(len, texts), default=0) <= PIECE_CHARACTERS:
            return self._encode(texts)
        results: list[list[int]] = [[] for _ in texts]
        pieces = ((i, piece) for i, text in enumerate(texts) for piece in text_pieces(text))
        while group := list(islice(pieces, GROUP_CHARACTERS // PIECE_CHARACTERS)):
            encoded = self._encode([piece for _, piece in group])
            for (i, _), ids in zip(group, encoded, strict=True):
                results[i] += ids
        return results

    def with_offsets(self, texts: list[str]) -> list[Any]:
        """Return encodings with `ids` and `offsets`, the (start, end) characters of every token."""
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def text_pieces(text: str) -> Iterator[str]:
    """Cut a long text before spaces.

    Threads can then share it, and its encoding does not hold all of it at once.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        word_end = WORD_END.search(text, start + PIECE_CHARACTERS)
        if word_end is None:
            break
        yield text[start : word_end.end()]
        start = word_end.end()
    yield text[start:]


class TokenLimit:
    """Check that texts hold no token beyond the rows of a model's embedding.

    Args:
        rows: vocab_size of the model.
        remedy: what the user can do instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, remedy: str):
        self.tokenizer, self.rows, self.remedy = tokenizer, rows, remedy

    def check(self, ids: Iterable[int], where: str) -> None:
        """Raise a UserError if one of the ids has no row."""
        beyond = next((int(token) for token in ids if token >= self.rows), None)
        if beyond is not None:
            raise UserError(
                f"the tokenizer's {self.tokenizer.convert_ids_to_tokens(beyond)!r} has id "
                f"{beyond}, and the model's embedding has {self.rows} rows, 0 to {self.rows - 1}",
                where,
                self.remedy,
            )


def token_limit(tokenizer: PreTrainedTokenizerBase, rows: int, remedy: str) -> TokenLimit | None:
    """Return the check that texts need; None if every id of the tokenizer has a row."""
    return (
        TokenLimit(tokenizer, rows, remedy) if max(tokenizer.get_vocab().values()) >= rows else None
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides which ids a text gets."""
    serialized = cast(Any, tokenizer).backend_tokenizer.to_str()
    return _fingerprint(serialized, tokenizer.eos_token_id, len(tokenizer))


@lru_cache(maxsize=4)
def _fingerprint(serialized: str, eos: int, size: int) -> str:
    state = json.loads(serialized)
    # A call such as tokenizer(text, truncation=True) leaves its arguments in the backend.
    state.update(truncation=None, padding=None, eos=eos, size=size)
    text = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
