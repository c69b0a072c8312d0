"""Does torch.compile make a block of GPT-J faster? Forward and backward, eager beside compiled, in turns.

    python bench/compile_block.py [--device cuda --width 4096 --heads 16 --rotary 64] [--out FILE.json]

One block on a flat batch of two documents, bf16. The rotation works on complex numbers, for which torch's code generator
falls back to its own kernels; the rest (layer norm, GELU, residuals) is what it can fuse.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import GPTJConfig
from workload import machine

from finetune.gptj.attention import Context, pack, pick_attention, rope_tables
from finetune.gptj.model import Block


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rotary", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = GPTJConfig(
        n_embd=args.width,
        n_layer=1,
        n_head=args.heads,
        rotary_dim=args.rotary,
        n_positions=args.tokens,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    device, half = torch.device(args.device), args.tokens // 2
    block = Block(config).to(device, torch.bfloat16).train()
    x = torch.randn(
        1, args.tokens, args.width, device=device, dtype=torch.bfloat16, requires_grad=True
    )
    rope = rope_tables(torch.arange(args.tokens, device=device) % half, args.rotary)
    kind = pick_attention("auto", args.device, x.dtype)
    context = Context(rope, pack(torch.tensor([0, half, args.tokens]), kind, device))

    def seconds(module: torch.nn.Module) -> float:
        began = time.perf_counter()
        out = module(x, context, 0)
        out.backward(torch.ones_like(out))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    compiled = torch.compile(copy.deepcopy(block), dynamic=True)
    first = seconds(compiled)
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for turn in range(args.rounds + 2):
        for name, module in (("eager", block), ("compiled", compiled)):
            took = seconds(module)
            if turn >= 2:
                times[name].append(took)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "attention": kind,
        "compile_seconds": first,
        **{
            name: {"median_seconds": statistics.median(found), "spread": [min(found), max(found)]}
            for name, found in times.items()
        },
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
