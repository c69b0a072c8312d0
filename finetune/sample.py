"""Text from a model in training or from an export: left-padded batches, a key/value cache, seeds of their own.

Sampling is an arg-max over scores with Gumbel noise (the same distribution as drawing from the softmax). The noise of
a prompt depends on the seed, the prompt's ids and the step alone, so a prompt gets the same text in any batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import TextStreamer


@dataclass
class Sampling:
    """How a continuation is chosen."""

    max_new_tokens: int = 100
    """Longest continuation, in tokens."""
    temperature: float = 0.9
    """0: the most likely token, always."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all."""
    beams: int = 1
    """Beam search where more than 1; does not sample."""
    stop: Sequence[str] = ()
    """Strings that end the text; they are cut off."""
    seed: int = 0

    @property
    def samples(self) -> bool:
        return self.temperature > 0 and self.beams == 1


class StopTexts(StoppingCriteria):
    """Ends a row once a stop string stands in what was generated; the prompt does not count.

    Args:
        prompt_tokens: length of the padded prompts.
    """

    def __init__(self, tokenizer, stops: Sequence[str], prompt_tokens: int):
        self.tokenizer, self.stops, self.start = tokenizer, [stop for stop in stops if stop], prompt_tokens
        # No token stands for less than a byte, so a stop string that just ended lies within its last tokens.
        self.window = max((len(stop.encode()) for stop in self.stops), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused) -> Tensor:
        new = input_ids[:, self.start :][:, -self.window :].tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


class GumbelNoise(LogitsProcessor):
    """The arg-max of its result is a draw from the softmax; each prompt has a generator of its own."""

    def __init__(self, prompts: list[list[int]], seed: int):
        keys = [zlib.crc32(np.asarray(ids, np.int64).tobytes()) for ids in prompts]
        # torch's CPU generator takes 32 bits of its seed.
        self.generators = [torch.Generator().manual_seed(key ^ (seed * 2654435761 % 2**32)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[1]
        rows = [torch.empty(width).exponential_(generator=generator) for generator in self.generators]
        return scores.float() - torch.stack(rows).to(scores.device).log()


def continue_ids(model: nn.Module, tokenizer, prompts: list[list[int]], how: Sampling, device: torch.device,
                 streamer=None) -> list[list[int]]:
    """Ids behind each prompt, without eos.

    Args:
        prompts: token ids, at least one each.
        streamer: transformers' streamer, for a single prompt.
    """
    eos = tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[eos] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    warpers = LogitsProcessorList()
    if how.samples:
        warpers.append(TemperatureLogitsWarper(float(how.temperature)))
        if how.top_k:
            warpers.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            warpers.append(TopPLogitsWarper(how.top_p))
        warpers.append(GumbelNoise(prompts, how.seed))
    stops = {"stopping_criteria": StoppingCriteriaList([StopTexts(tokenizer, how.stop, longest)])} if how.stop else {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=how.max_new_tokens, use_cache=True, do_sample=False,
                temperature=None, top_p=None, top_k=None, num_beams=how.beams, pad_token_id=eos, eos_token_id=eos,
                logits_processor=warpers, streamer=streamer, **stops)
    finally:
        model.train(was_training)
    return [row[: row.index(eos)] if eos in row else row for row in out[:, longest:].tolist()]


def sample_texts(model: nn.Module, tokenizer, prompts: list[str], max_new_tokens: int, seed: int, device: torch.device,
                 how: Sampling | None = None, encode: Callable[[str], list[int]] | None = None) -> list[str]:
    """Continuations of `prompts`, without the prompts; by default sampled at temperature 0.9, top_p 0.95.

    Args:
        encode: prompt -> ids, for prompts that go into a template; otherwise they are read as they stand.
    """
    how = how or Sampling(max_new_tokens, top_p=0.95, seed=seed)
    encode = encode or (lambda prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = [encode(prompt) or [tokenizer.eos_token_id] for prompt in prompts]
    return [finished_text(tokenizer, row, how.stop) for row in continue_ids(model, tokenizer, ids, how, device)]


def finished_text(tokenizer, ids: list[int], stops: Sequence[str]) -> str:
    """Decoded ids up to the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


class Streamer(TextStreamer):
    """Hands text on as it comes, whole words at a time, and nothing of a stop string or behind one.

    Args:
        emit: called with each piece of text.
    """

    def __init__(self, tokenizer, stops: Sequence[str], emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops, self.emit = [stop for stop in stops if stop], emit
        self.held, self.stopped = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stopped:
            return
        self.held += text
        ends = [at for at in map(self.held.find, self.stops) if at >= 0]
        if ends:
            self.stopped = True
            ready, self.held = self.held[: min(ends)], ""
        else:
            keep = 0 if stream_end else max((n for stop in self.stops for n in _overlaps(self.held, stop)), default=0)
            ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if ready:
            self.emit(ready)


def _overlaps(text: str, stop: str) -> Iterator[int]:
    """Lengths of the beginnings of `stop` that `text` ends with."""
    return (n for n in range(1, len(stop)) if text.endswith(stop[:n]))
