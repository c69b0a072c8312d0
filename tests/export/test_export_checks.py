"""What an export is refused for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import RunFailed
from finetune.export.write import check_adapter
from finetune.training.run_dir import wherever

A, B = (
    "base_model.model.transformer.h.0.attn.q_proj.lora_A.weight",
    "base_model.model.transformer.h.0.attn.q_proj.lora_B.weight",
)


def adapter(folder, **tensors):
    save_file(
        {name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_an_adapter_that_was_trained_is_counted(tmp_path):
    found = check_adapter(adapter(tmp_path, **{A: torch.ones(2, 4), B: torch.ones(4, 2)}))
    assert found == {"adapter_tensors": 2, "lora_tensors": 2, "lora_nonzero": 2}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({}, "no tensors"),
        ({A: torch.ones(2, 4), B: torch.empty(0)}, B),
        ({A: torch.ones(2, 4), B: torch.zeros(4, 2)}, B),
        ({A: torch.zeros(2, 4), B: torch.ones(4, 2)}, A),
        (
            {A: torch.ones(2, 4), B: torch.ones(4, 2), B.replace("h.0", "h.1"): torch.zeros(4, 2)},
            "h.1",
        ),
    ],
)
def test_an_empty_or_all_zero_tensor_is_refused_by_name(tmp_path, tensors, named):
    with pytest.raises(RunFailed) as caught:
        check_adapter(adapter(tmp_path, **tensors))
    assert named in str(caught.value)


def test_local_paths_hold_from_any_working_directory(tmp_path, monkeypatch):
    """As config.yaml keeps them; hub ids and what ships with the project stay as typed."""
    (tmp_path / "base").mkdir()
    (tmp_path / "data-1.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    kept = [
        wherever(path)
        for path in ("base", "data-*.jsonl", "EleutherAI/gpt-j-6b", "asset:gptj_tiny", None)
    ]
    assert kept == [
        f"{tmp_path}/base",
        f"{tmp_path}/data-*.jsonl",
        "EleutherAI/gpt-j-6b",
        "asset:gptj_tiny",
        None,
    ]
