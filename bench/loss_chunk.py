"""Seconds of the loss and its gradients by the number of rows whose logits exist at once, beside plain torch.

    python bench/loss_chunk.py [--rows 2048] [--width 512] [--frozen] [--dtype bf16|fp32] [--rounds 4] [--out FILE.json]

`planning/activations.py` holds the sizes that were chosen by it: TRAINED_CHUNK where the head is trained, LOSS_CHUNK where
it is frozen (--frozen). The best of some rounds counts, in turns; the precision is the one that this processor multiplies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from workload import fast_dtype, machine

VOCAB = 50400
CHUNKS = (256, 512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=fast_dtype())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import torch
    import torch.nn.functional as F

    from finetune.gptj import loss

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(args.rows, args.width, dtype=dtype, requires_grad=True)
    trained = not args.frozen
    weight = (torch.randn(VOCAB, args.width) * 0.02).to(dtype).requires_grad_(trained)
    bias = torch.zeros(VOCAB, dtype=dtype, requires_grad=trained)
    labels = torch.randint(0, VOCAB, (args.rows,))

    def plain() -> torch.Tensor:
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def chunked(rows: int) -> torch.Tensor:
        loss.LOSS_CHUNK = loss.TRAINED_CHUNK = rows
        loss.one_chunk = lambda tokens, width, element_bytes: tokens <= rows
        return loss.chunked_cross_entropy(hidden, weight, bias, labels)

    ways = {"plain torch": plain} | {f"{n} rows": lambda n=n: chunked(n) for n in CHUNKS}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(args.rounds):
        for name, way in ways.items():
            hidden.grad = weight.grad = bias.grad = None
            started = time.perf_counter()
            way().backward()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    for name, value in seconds.items():
        print(f"{name:12} {value * 1e3:8.0f} ms")
    if args.out:
        found = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "dtype": args.dtype,
            "seconds": seconds,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
