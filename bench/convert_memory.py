"""Host memory of converting a checkpoint: `python bench/convert_memory.py [--layers 16] [--out FILE.json]`.

Random checkpoints of 2 GB in bf16 (safetensors) and twice that in fp32 (one pytorch_model.bin with GPT-J's legacy buffers)
become bf16 and fp16 safetensors, a Phi model and a GGUF file through `launch/convert.py`, each time in a process of its
own; the kernel tells its peak resident memory. The same program on the shipped tiny model is what interpreter and
libraries take.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from load_memory import LAYOUTS, VOCABULARY, WIDTH, make
from workload import ROOT, machine, peak_bytes

TOKENIZER = ROOT / "finetune/assets/tokenizer"
FORMS = (("hf", "bf16"), ("hf", "fp16"), ("phi", "bf16"), ("gguf", "fp16"))
"""Forms and precisions of the targets."""


def peak(source: str, target: Path, form: str, dtype: str) -> int:
    return peak_bytes(
        [
            sys.executable,
            "launch/convert.py",
            f"source={source}",
            f"target={target}",
            f"to={form}",
            f"dtype={dtype}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/convert_memory.json")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        libraries = {
            form: peak("asset:gptj_tiny", folder / form, form, "fp16") for form in dict(FORMS)
        }
        for i, layout in enumerate(LAYOUTS):
            source = make(folder / f"source{i}", args.layers, layout)
            shutil.copytree(TOKENIZER, source, dirs_exist_ok=True)
            size = sum(file.stat().st_size for file in source.iterdir())
            for form, dtype in FORMS:
                target = folder / "target"
                row = {
                    "from": layout,
                    "bytes": size,
                    "to": form,
                    "dtype": dtype,
                    "peak_bytes": peak(str(source), target, form, dtype),
                }
                shutil.rmtree(target)
                row["above_libraries_bytes"] = row["peak_bytes"] - libraries[form]
                print(json.dumps(row), flush=True)
                found.append(row)
    result = {
        "command": f"python bench/convert_memory.py --layers {args.layers}",
        "libraries_bytes": libraries,
        "largest_tensor_bytes_fp32": 4 * VOCABULARY * WIDTH,
        "conversions": found,
        "machine": machine(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
