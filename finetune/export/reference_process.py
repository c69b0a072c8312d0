"""Outputs of a run's model as it was trained, computed in a process of its own.

    python -m finetune.export.reference_process CHECKPOINT KIND DTYPE TEXTS.json OUT.safetensors

Whoever exports stays small: this process holds the model once, and ends before `finetune.export.write.verify` opens the export.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from finetune.config import Dtype, Quantize


def main(checkpoint: Path, kind: str, dtype: str, texts: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from finetune.data.tokenizer import load_tokenizer
    from finetune.export.reopen import about_of_run, load_config, load_run, readable
    from finetune.export.write import reference_outputs
    from finetune.gptj.load import tokenizer_of

    run_dir = checkpoint.parent.parent
    cfg = load_config(run_dir)
    model = cfg.model
    if kind in (
        "adapter",
        "phi_adapter",
    ):  # whoever loads the adapter loads the base in this precision; a merge has the run's
        model = replace(model, dtype=Dtype(dtype))
    if kind != "adapter":  # all others hold, or are read on, the base as it was before quantising
        model = replace(model, quantize=Quantize.none)
    cfg = replace(cfg, model=model)
    device = torch.device("cpu")
    module = load_run(
        cfg,
        checkpoint,
        cfg.task.head,
        about_of_run(run_dir).get("num_labels"),
        device,
        Dtype(dtype),
    )
    module = readable(module, Dtype(dtype), device)
    head, eos = cfg.task.head, load_tokenizer(tokenizer_of(cfg.model)).eos_token_id
    save_file(
        reference_outputs(module, json.loads(texts.read_text(encoding="utf-8")), head, eos, device),
        out,
    )
    print(json.dumps({"parameters": sum(p.numel() for p in module.parameters())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
