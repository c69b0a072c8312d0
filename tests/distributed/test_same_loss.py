"""The loss does not depend on ranks, stage, accumulation or packing, and is the one of plain Hugging Face and torch."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open

from finetune.data.tokenizer import load_tokenizer
from finetune.names import MODULES
from tests.distributed import reference
from tests.distributed.ranks import losses, run_cases

STEPS, LENGTH, BATCH = 20, 32, 8
COMMON = dict(steps=STEPS, global_batch=BATCH, length=LENGTH, lr=2e-3, weight_decay=0.1, clip=1.0, seed=3)
BETA1 = 0.9


def overrides(small: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return ["recipe=clm_pile", f"model.path={small}", "model.dtype=fp32", f"data.train={data}", f"run_dir={run_dir}",
            f"task.max_length={LENGTH}", f"train.steps={STEPS}", f"train.global_batch={BATCH}", "seed=3",
            "optim.lr=2e-3", "optim.weight_decay=0.1", "optim.betas=[0.9,0.999]", "optim.warmup=0", "optim.min_lr=0",
            "train.eval_every=0", "train.probe=false", "export.enabled=false", "train.activation_checkpointing=false",
            "checkpoint.every=0", *more]


LORA = ["adapter=lora", "adapter.rank=4", "adapter.alpha=8", "adapter.targets=all-linear"]


def lora(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(MODULES)))


def first_gradients(run_dir: Path) -> dict[str, torch.Tensor]:
    """Gradients of step 1, read back from Adam's first average: exp_avg = (1 - beta1) * gradient."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in (run_dir / "checkpoints/step-00000001").glob("optim-*.safetensors"):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                name, start, kind = key.rsplit("|", 2)
                if kind == "exp_avg":
                    pieces.setdefault(name, []).append((int(start), handle.get_tensor(key)))
    return {name: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) / (1 - BETA1)
            for name, parts in pieces.items()}


@pytest.fixture(scope="module")
def trained(small_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs on two ranks in one group of processes, and those on one rank in another."""
    root = tmp_path_factory.mktemp("same_loss")

    def case(name: str, *more: str) -> list[str]:
        return overrides(small_gptj, unequal_documents, root / name, *more)

    two = [case(f"full-stage{s}-acc{a}-2", f"zero=stage{s}", f"train.micro_batch={BATCH // 2 // a}")
           for s, a in ((0, 1), (0, 4), (1, 2), (2, 2), (2, 4), (3, 1), (3, 2))]
    two += [case(f"lora-stage{s}-acc{a}-2", f"zero=stage{s}", f"train.micro_batch={BATCH // 2 // a}", *LORA)
            for s, a in ((0, 1), (1, 2), (2, 4), (3, 2))]
    two += [case(f"padded-stage{s}-acc{a}-2", f"zero=stage{s}", f"train.micro_batch={BATCH // 2 // a}",
                 "train.packing=false") for s, a in ((0, 2), (1, 2), (2, 1), (3, 4))]
    two += [case(f"first-stage{s}", f"zero=stage{s}", "train.micro_batch=2", "train.steps=1", "checkpoint.every=1",
                 "optim.schedule=constant") for s in range(4)]
    two += [case(f"bf16-stage{s}", f"zero=stage{s}", "train.micro_batch=2", "model.dtype=bf16") for s in range(4)]
    two += [case(f"checkpointed-{kind}-stage{s}-2", f"zero=stage{s}", "train.micro_batch=2",
                 f"train.activation_checkpointing={kind}") for kind, s in (("selective", 2), ("offload", 2), ("offload", 3))]
    one = [case(f"full-stage{s}-acc{a}-1", f"zero=stage{s}", f"train.micro_batch={BATCH // a}")
           for s, a in ((0, 1), (0, 4), (1, 1), (2, 2), (3, 1))]
    one += [case("lora-stage1-acc2-1", "zero=stage1", "train.micro_batch=4", *LORA)]
    one += [case("padded-stage2-acc4-1", "zero=stage2", "train.micro_batch=2", "train.packing=false")]
    one += [case("checkpointed-1", "zero=stage0", "train.micro_batch=8", "train.activation_checkpointing=true")]
    run_cases(2, two)
    run_cases(1, one)
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(None)


@pytest.fixture(scope="module")
def packed_losses(small_gptj, unequal_documents, tokenizer) -> list[float]:
    """Of plain torch on Hugging Face's GPT-J, in fp32."""
    return reference.train(small_gptj, unequal_documents, tokenizer, packing=True, **COMMON)[0]


def worst(found: list[float], wanted: list[float]) -> float:
    """Largest relative difference of two whole sequences."""
    assert len(found) == len(wanted) == STEPS
    return max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_full_packed_is_plain_torch(trained, packed_losses):
    wanted = packed_losses
    runs = sorted([*trained.glob("full-*"), *trained.glob("checkpointed-*")])
    assert len(runs) == 16
    for run in runs:
        assert worst(losses(run), wanted) <= 1e-5, run


@pytest.mark.slow
def test_padded_is_plain_torch(trained, small_gptj, unequal_documents, tokenizer):
    wanted, _ = reference.train(small_gptj, unequal_documents, tokenizer, packing=False, **COMMON)
    runs = sorted(trained.glob("padded-*"))
    assert len(runs) == 5
    for run in runs:
        assert worst(losses(run), wanted) <= 1e-5, run


@pytest.mark.slow
def test_lora_is_plain_peft(trained, small_gptj, unequal_documents, tokenizer):
    wanted, _ = reference.train(small_gptj, unequal_documents, tokenizer, packing=True, wrap=lora, **COMMON)
    runs = sorted(trained.glob("lora-*"))
    assert len(runs) == 5
    for run in runs:
        assert worst(losses(run), wanted) <= 1e-5, run


@pytest.mark.slow
def test_bf16_stays_close_to_fp32(trained, packed_losses):
    wanted = packed_losses
    for stage in range(4):
        assert worst(losses(trained / f"bf16-stage{stage}"), wanted) <= 1e-2, stage


@pytest.mark.slow
def test_first_gradients_are_plain_torch(trained, small_gptj, unequal_documents, tokenizer):
    """Also proves the scale factor: a mean of means would be off by the ratio of token counts."""
    _, wanted = reference.train(small_gptj, unequal_documents, tokenizer, packing=True, **{**COMMON, "steps": 1})
    for stage in range(4):
        found = first_gradients(trained / f"first-stage{stage}")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = gradient.abs().max()
            assert (found[name] - gradient.flatten()).abs().max() <= 1e-5 * scale, (stage, name)


@pytest.mark.slow
def test_optimizer_bytes_are_divided(trained):
    """Stage 1 and up hold half of Adam's states on each of two ranks; stage 0 holds all of them."""
    import json

    held = {stage: json.loads((trained / f"first-stage{stage}" / "result.json").read_text())["optimizer_bytes_per_rank"]
            for stage in range(4)}
    whole = held[0][0]
    assert held[0] == [whole, whole]
    for stage in (1, 2, 3):
        # fp32 weights are their own masters at stage 0 only: 8 bytes a parameter there, 12 / 2 elsewhere.
        assert sum(held[stage]) == pytest.approx(whole * 12 / 8, rel=0.001)
        assert held[stage][0] == pytest.approx(held[stage][1], rel=0.001)
