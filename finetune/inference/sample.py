"""Text generation by a model in training or an export.

`continue_ids` generates with transformers, from left-padded batches with a key/value cache; it
serves exports. `continue_flat` decodes with the training forward, without a cache; it serves
samples of a model in training, and adapters of virtual tokens. Both select tokens in the same way
and give the same text.

Sampling is an arg-max over scores with Gumbel noise (the same distribution as drawing from the
softmax). The noise of a prompt depends only on the seed, the prompt's ids and the step, so a prompt
gets the same text in any batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import TextStreamer

from finetune.errors import UserError


@dataclass
class Sampling:
    """Settings of how a continuation is generated."""

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


CACHE_STEP = 64
"""Lengths of the cache for compiled decoding are multiples of this many tokens."""


class StopTexts(StoppingCriteria):
    """Stopping criterion that ends a row once its generated text contains a stop string.

    The prompt does not count.

    Args:
        prompt_tokens: length of the padded prompts.
    """

    def __init__(self, tokenizer, stops: Sequence[str], prompt_tokens: int):
        self.tokenizer, self.start = tokenizer, prompt_tokens
        self.stops = [stop for stop in stops if stop]
        # A token is at least one byte, so a stop string that just ended lies within this many
        # tokens.
        self.window = max((len(stop.encode()) for stop in self.stops), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.start :][:, -self.window :].tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor(
            [any(stop in text for stop in self.stops) for text in texts], device=input_ids.device
        )


class GumbelNoise(LogitsProcessor):
    """Add noise whose arg-max is a draw from the softmax, with one generator per prompt."""

    def __init__(self, prompts: list[list[int]], seed: int):
        keys = [zlib.crc32(np.asarray(ids, np.int64).tobytes()) for ids in prompts]
        # torch's CPU generator uses 32 bits of its seed.
        self.generators = [
            torch.Generator().manual_seed(key ^ (seed * 2654435761 % 2**32)) for key in keys
        ]

    def keep(self, rows: list[int]) -> None:
        """Keep the generators of these rows only."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[1]
        rows = [
            torch.empty(width).exponential_(generator=generator) for generator in self.generators
        ]
        return scores.float() - torch.stack(rows).to(scores.device).log()


def _choice(how: Sampling, noise: GumbelNoise) -> LogitsProcessorList:
    """Build the logits processors after which the largest score is the next token."""
    processors = LogitsProcessorList()
    if how.temperature > 0 and how.beams == 1:
        processors.append(TemperatureLogitsWarper(float(how.temperature)))
        if how.top_k:
            processors.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            processors.append(TopPLogitsWarper(how.top_p))
        processors.append(noise)
    return processors


def continue_ids(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    how: Sampling,
    device: torch.device,
    streamer=None,
    compiled: bool = False,
) -> list[list[int]]:
    """Generate the ids that follow each prompt, without eos.

    Args:
        model: transformers' GPTJForCausalLM, alone or under peft, in evaluation mode.
        prompts: token ids, at least one each.
        streamer: transformers' streamer, for a single prompt.
        compiled: decode by transformers' compiled forward with a cache of fixed length. Every new
            length is compiled once, which takes up to a minute.
    """
    eos = tokenizer.eos_token_id
    longest = max(map(len, prompts))
    options: dict[str, Any] = {}
    if compiled:
        # More padding, so that few lengths occur.
        longest += -(longest + how.max_new_tokens) % CACHE_STEP
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compile_config}
    ids = torch.tensor([[eos] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = StoppingCriteriaList([StopTexts(tokenizer, how.stop, longest)] if how.stop else [])
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=how.max_new_tokens,
            use_cache=True,
            do_sample=False,
            num_beams=how.beams,
            pad_token_id=eos,
            eos_token_id=eos,
            streamer=streamer,
            logits_processor=_choice(how, GumbelNoise(prompts, how.seed)),
            stopping_criteria=stops,
            **options,
        )
    return [row[: row.index(eos)] if eos in row else row for row in out[:, longest:].tolist()]


def continue_flat(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    how: Sampling,
    device: torch.device,
    streamer=None,
    agree: Callable[[list[int]], list[int]] = list,
) -> list[list[int]]:
    """Continue as `continue_ids` does, but recompute the whole text for every token.

    It uses the training forward, which has no cache.

    Args:
        model: a `CausalLM`, alone or with its adapter. At ZeRO stage 3 every rank calls this.
        agree: makes the chosen tokens of a step the same on all ranks.

    Raises:
        UserError: beam search needs a cache.
    """
    if how.beams > 1:
        raise UserError(
            "adapters of virtual tokens are read without a cache, which beam search needs",
            "beams",
            "Leave beams out.",
        )
    eos, start = tokenizer.eos_token_id, [len(prompt) for prompt in prompts]
    noise = GumbelNoise(prompts, how.seed)
    choice, stop = _choice(how, noise), StopTexts(tokenizer, how.stop, 0)
    texts, live = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    was_training = model.training
    model.eval()
    if streamer is not None:
        streamer.put(torch.tensor(texts[0]))
    try:
        for _ in range(how.max_new_tokens):
            # One flat batch of the unfinished rows; logits at the end of each of them.
            lengths = torch.tensor([len(texts[row]) for row in live], dtype=torch.int32)
            ends = lengths.cumsum(0, dtype=torch.int32)
            ids = torch.tensor([i for row in live for i in texts[row]], device=device)
            positions = torch.cat([torch.arange(int(n), device=device) for n in lengths])
            with torch.no_grad():
                scores = model(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    cu_seqlens=torch.cat([ends.new_zeros(1), ends]),
                    keep=ends.long().to(device) - 1,
                )
            chosen = agree(choice(ids[None], scores.float()).argmax(-1).tolist())
            for row, token in zip(live, chosen, strict=True):
                texts[row].append(token)
            if streamer is not None:
                streamer.put(torch.tensor(chosen))
            # A row ends with eos or after a stop string.
            ended = [token == eos for token in chosen]
            if stop.stops:
                new = torch.tensor([texts[row][start[row] :] for row in live])
                ended = [a or b for a, b in zip(ended, stop(new, scores).tolist(), strict=True)]
            kept = [i for i, over in enumerate(ended) if not over]
            noise.keep(kept)
            live = [live[i] for i in kept]
            if not live:
                break
    finally:
        model.train(was_training)
    if streamer is not None:
        streamer.end()
    return [
        text[n : -1 if text[-1] == eos and len(text) > n else None]
        for text, n in zip(texts, start, strict=True)
    ]


def finished_text(tokenizer, ids: list[int], stops: Sequence[str]) -> str:
    """Decode ids up to the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


class Streamer(TextStreamer):
    """Streamer that emits text in whole words, up to the first stop string.

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
            self.stopped, ready = True, min(ends)
        elif stream_end:
            ready = len(self.held)
        else:
            # Hold back the longest end of the text that may be the beginning of a stop string.
            overlaps = [
                n
                for stop in self.stops
                for n in range(1, len(stop))
                if self.held.endswith(stop[:n])
            ]
            ready = len(self.held) - max(overlaps, default=0)
        said, self.held = self.held[:ready], self.held[ready:]
        if said:
            self.emit(said)
