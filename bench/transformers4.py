"""Does an export open in transformers 4's Flax and TensorFlow GPT-J, which transformers 5 no longer has?

    pip install 'transformers>=4.40,<4.50' flax 'jax<0.7' torch       (and tensorflow<2.16 tf-keras for --tf)
    python bench/transformers4.py EXPORT_DIR [--tf] [--out result.json]

Logits of a merged or full language model export (fp32), by PyTorch and by the other framework, on the same ids. Needs
nothing of this project; run it in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

IDS = [[464, 2159, 286, 262, 1578, 1829, 318, 257, 845, 890, 2420, 13]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--tf", action="store_true", help="TensorFlow instead of Flax")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    with torch.no_grad():
        model = transformers.GPTJForCausalLM.from_pretrained(
            args.export, torch_dtype=torch.float32
        ).eval()
        wanted = model(torch.tensor(IDS)).logits.numpy()
    kind = transformers.TFGPTJForCausalLM if args.tf else transformers.FlaxGPTJForCausalLM
    other = kind.from_pretrained(args.export, from_pt=True)
    found = np.asarray(other(np.array(IDS)).logits, np.float32)
    result = {
        "class": kind.__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tokens": len(IDS[0]),
        "vocabulary": wanted.shape[-1],
        "max_difference": float(np.abs(found - wanted).max()),
        "argmax_agreement": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
        "largest_logit": float(np.abs(wanted).max()),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
