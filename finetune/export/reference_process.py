"""Outputs of a run's model as it was trained, computed in a process of its own.

    python -m finetune.export.reference_process CHECKPOINT KIND DTYPE OUT.safetensors

Whoever exports stays small: this process holds the model once, and ends before
`finetune.export.verify` opens the export.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune.config import Dtype, Quantize
from finetune.data.tokenizer import load_tokenizer
from finetune.export.kinds import KINDS
from finetune.export.proof import reference_outputs
from finetune.export.reopen import (
    about_of_run,
    load_config,
    load_run,
    readable,
    reference_texts_of,
)
from finetune.gptj.load import tokenizer_of


def main(checkpoint: Path, kind: str, dtype: Dtype, out: Path) -> None:
    """Write the outputs for an export of `kind` to `out`, and print the number of parameters."""
    run_dir = checkpoint.parent.parent
    cfg, device = load_config(run_dir), torch.device("cpu")
    model = cfg.model
    if not KINDS[kind].whole:
        # Whoever loads the adapter loads the base in this precision; a merge has the run's.
        model = replace(model, dtype=dtype)
    if kind != "adapter":
        # All others hold, or are read on, the base as it was before it was quantised.
        model = replace(model, quantize=Quantize.none)
    cfg = replace(cfg, model=model)
    head, about = cfg.task.head, about_of_run(run_dir)
    labels, tokens = about.get("num_labels"), about.get("tokens", {}).values()
    module = load_run(cfg, checkpoint, head, labels, device, dtype, tokens)
    module = readable(module, dtype, device)
    eos = load_tokenizer(tokenizer_of(cfg.model), cfg.task).eos_token_id
    save_file(reference_outputs(module, reference_texts_of(run_dir), head, eos, device), out)
    print(json.dumps({"parameters": sum(p.numel() for p in module.parameters())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Dtype(sys.argv[3]), Path(sys.argv[4]))
