"""adapter.init: what a LoRA begins from, and what remains of the base, are peft's; its file is never replaced."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTJForCausalLM

from finetune.compose import compose_train
from finetune.config import Config
from finetune.errors import UserError
from finetune.gptj import adapter_init
from finetune.gptj.adapter_init import DOWN, FILE, UP, init_problems, read_init, write_init
from finetune.planning.shape import LINEARS, PEFT_PREFIX


def config(model: Path, init: str, *words: str) -> Config:
    common = ["recipe=clm_pile_lora", f"model.path={model}", "model.dtype=fp32", "adapter.rank=4"]
    return compose_train([*common, "adapter.alpha=12", f"adapter.init={init}", *words])


def written(cfg: Config, folder: Path) -> Path:
    write_init(cfg, folder / FILE, torch.device("cpu"), lambda done, total: None)
    return folder


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_matrices_and_residuals_are_those_of_peft(pocket_gptj, tmp_path, init, rslora):
    """With a scale that is not 1; singular vectors have no sign of their own."""
    cfg = config(pocket_gptj, init, f"adapter.rslora={rslora}")
    ours = read_init(cfg, written(cfg, tmp_path))
    base = GPTJForCausalLM.from_pretrained(pocket_gptj, dtype=torch.float32)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=list(LINEARS),
        init_lora_weights=init,
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(base, settings)
    tensors = theirs.state_dict()
    assert len(ours.shapes) == 2 * 2 * len(LINEARS)
    for name, weight in weights.items():
        layer = f"{PEFT_PREFIX}{name}".removesuffix(".weight")
        residual = ours.residual(name, weight)
        if layer + DOWN not in tensors:
            assert residual is weight
            continue
        torch.testing.assert_close(
            residual, tensors[f"{layer}.base_layer.weight"], rtol=0, atol=1e-6
        )
        down, up = (ours.handle.get_tensor(layer + end) for end in (DOWN, UP))
        signs = (down * tensors[layer + DOWN]).sum(1).sign()
        torch.testing.assert_close(down * signs[:, None], tensors[layer + DOWN], rtol=0, atol=2e-6)
        torch.testing.assert_close(up * signs, tensors[layer + UP], rtol=0, atol=2e-6)


def test_large_weights_are_decomposed_by_subspace_iteration(monkeypatch):
    """Singular values that fall as those of trained weights do."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(300, 200))
    v, _ = torch.linalg.qr(torch.randn(200, 200))
    weight = u * torch.arange(1, 201) ** -0.5 @ v.t()
    exact_down, exact_up = adapter_init.pissa(weight, 8, 2.0)
    monkeypatch.setattr(adapter_init, "EXACT_SIDE", 0)
    down, up = adapter_init.pissa(weight, 8, 2.0)
    torch.testing.assert_close(up @ down, exact_up @ exact_down, rtol=0, atol=1e-4)


def test_another_file_or_none_is_refused(pocket_gptj, tmp_path):
    cfg = config(pocket_gptj, "pissa")
    with pytest.raises(UserError, match=r"the adapter began from \(adapter.init=pissa.* missing"):
        read_init(cfg, tmp_path)
    written(cfg, tmp_path)
    with pytest.raises(UserError, match="these are not the matrices"):
        read_init(config(pocket_gptj, "pissa", "adapter.layers=[1]"), tmp_path)
    assert read_init(config(pocket_gptj, "default"), tmp_path) is None


def test_the_precision_is_that_of_the_base(pocket_gptj, tmp_path):
    """The residual is rounded once: nearer to W - s B0 A0 than half a unit in the last place."""
    cfg = config(pocket_gptj, "pissa", "model.dtype=bf16")
    init = read_init(cfg, written(cfg, tmp_path))
    tensors = load_file(tmp_path / FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "transformer.h.1.mlp.fc_in.weight"
    weight = load_file(pocket_gptj / "model.safetensors")[name].bfloat16()
    layer = f"{PEFT_PREFIX}{name}".removesuffix(".weight")
    exact = weight.double() - 3 * tensors[layer + UP].double() @ tensors[layer + DOWN].double()
    residual = init.residual(name, weight)
    assert residual.dtype is torch.bfloat16
    assert ((residual.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-9).all()


def test_a_rank_above_the_smaller_side_is_refused(pocket_gptj):
    (problem,) = init_problems(config(pocket_gptj, "olora", "adapter.rank=33"))
    assert "adapter.rank = 33: the weights of this model have 32 components" in problem.problem
    assert not [*init_problems(config(pocket_gptj, "default", "adapter.rank=33"))]
