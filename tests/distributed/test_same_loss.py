"""The loss does not depend on ranks, stage, accumulation or packing, and is the one of plain Hugging Face and torch."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors import safe_open

from finetune.data.tokenizer import load_tokenizer
from finetune.planning.shape import LINEARS
from tests.conftest import ROOT
from tests.distributed import reference
from tests.distributed.ranks import losses, metrics, run_cases

STEPS, LENGTH, BATCH = 20, 32, 8
COMMON = dict(
    steps=STEPS, global_batch=BATCH, length=LENGTH, lr=2e-3, weight_decay=0.1, clip=1.0, seed=3
)
BETA1 = 0.9


def overrides(small: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "recipe=clm_pile",
        f"model.path={small}",
        "model.dtype=fp32",
        f"data.train={data}",
        f"run_dir={run_dir}",
        f"task.max_length={LENGTH}",
        f"train.steps={STEPS}",
        f"train.global_batch={BATCH}",
        "seed=3",
        "optim.lr=2e-3",
        "optim.weight_decay=0.1",
        "optim.betas=[0.9,0.999]",
        "optim.warmup=0",
        "optim.min_lr=0",
        "train.eval_every=0",
        "train.probe=false",
        "export.enabled=false",
        "train.activation_checkpointing=false",
        "checkpoint.every=0",
        *more,
    ]


LORA = ["adapter=lora", "adapter.rank=4", "adapter.alpha=8", "adapter.targets=all-linear"]


class Case(NamedTuple):
    adapter: str
    layout: str
    stage: int
    accumulation: int
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.adapter}-{self.layout}-stage{self.stage}-acc{self.accumulation}-{self.ranks}"

    @property
    def words(self) -> list[str]:
        return [
            f"zero=stage{self.stage}",
            f"train.micro_batch={BATCH // self.ranks // self.accumulation}",
            f"train.packing={'true' if self.layout == 'packed' else 'false'}",
            *(LORA if self.adapter == "lora" else []),
        ]


ADAPTERS, LAYOUTS, STAGES, ACCUMULATIONS, RANKS = (
    ("full", "lora"),
    ("packed", "padded"),
    range(4),
    (1, 2, 4),
    (1, 2),
)
WHOLE = [Case(*values) for values in product(ADAPTERS, LAYOUTS, STAGES, ACCUMULATIONS, RANKS)]
PART = [
    *(Case("full", "packed", s, a, 2) for s, a in ((0, 4), (1, 4), (2, 2), (2, 4), (3, 1), (3, 2))),
    *(Case("full", "packed", s, a, 1) for s, a in ((0, 1), (0, 4), (1, 1), (2, 2), (3, 1))),
    *(Case("full", "padded", s, a, 2) for s, a in ((0, 2), (1, 2), (2, 1), (3, 4))),
    *(Case("full", "padded", s, a, 1) for s, a in ((2, 4),)),
    *(Case("lora", "packed", s, a, 2) for s, a in ((0, 1), (1, 2), (2, 4), (3, 2))),
    *(Case("lora", "packed", s, a, 1) for s, a in ((1, 2),)),
    *(Case("lora", "padded", s, a, 2) for s, a in ((0, 4), (3, 1))),
]
"""What the suite runs: each adapter and layout at each stage, and every two of their values together somewhere."""
RESULT = ROOT / "bench/results/same_loss.json"
TOLERANCE = 1e-5


def lora(model):
    torch.manual_seed(3)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(LINEARS)),
    )


def first_gradients(run_dir: Path) -> dict[str, torch.Tensor]:
    """Gradients of step 1, read back from Adam's first average: exp_avg = (1 - beta1) * gradient."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in (run_dir / "checkpoints/step-00000001").glob("optim-*.safetensors"):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                name, start, kind = key.rsplit("|", 2)
                if kind == "exp_avg":
                    pieces.setdefault(name, []).append((int(start), handle.get_tensor(key)))
    return {
        name: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) / (1 - BETA1)
        for name, parts in pieces.items()
    }


@pytest.fixture(scope="module")
def grid(request: pytest.FixtureRequest) -> list[Case]:
    return WHOLE if request.config.getoption("--loss-grid") == "full" else PART


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, small_gptj: Path, pocket_gptj: Path) -> Path:
    """Of the grid: GPT-J's own vocabulary where all of it runs."""
    return small_gptj if request.config.getoption("--loss-grid") == "full" else pocket_gptj


@pytest.fixture(scope="module")
def trained(
    model: Path,
    small_gptj: Path,
    half_gptj: Path,
    unequal_documents: Path,
    tmp_path_factory: pytest.TempPathFactory,
    grid: list[Case],
) -> Path:
    """All runs on two ranks in one group of processes, and those on one rank in another."""
    root = tmp_path_factory.mktemp("same_loss")

    def case(name: str, *more: str, model: Path = model) -> list[str]:
        return overrides(model, unequal_documents, root / name, *more)

    two, one = ([case(c.name, *c.words) for c in grid if c.ranks == ranks] for ranks in (2, 1))
    first = [
        "train.micro_batch=2",
        "train.steps=1",
        "checkpoint.every=1",
        "optim.schedule=constant",
    ]
    two += [case(f"first-stage{s}", f"zero=stage{s}", *first, model=small_gptj) for s in STAGES]
    two += [
        case(f"first-lora-stage{s}", f"zero=stage{s}", *first, *LORA, model=small_gptj)
        for s in (2, 3)
    ]
    two += [
        case(
            f"bf16-stage{s}",
            f"zero=stage{s}",
            "train.micro_batch=2",
            "model.dtype=bf16",
            model=half_gptj,
        )
        for s in STAGES
    ]
    two += [
        case(
            f"checkpointed-{kind}-stage{s}-2",
            f"zero=stage{s}",
            "train.micro_batch=2",
            f"train.activation_checkpointing={kind}",
        )
        for kind, s in (("selective", 2), ("offload", 2), ("offload", 3))
    ]
    one += [
        case(
            "checkpointed-1",
            "zero=stage0",
            "train.micro_batch=8",
            "train.activation_checkpointing=true",
        )
    ]
    run_cases(2, two, timeout=2400)
    run_cases(1, one, timeout=2400)
    return root


@pytest.fixture(scope="module")
def plain(model, unequal_documents):
    """plain(adapter, layout): losses of plain torch on Hugging Face's GPT-J (and peft), in fp32."""

    @cache
    def train(adapter: str, layout: str, folder: Path = model) -> list[float]:
        return reference.train(
            folder,
            unequal_documents,
            load_tokenizer(str(folder)),
            packing=layout == "packed",
            wrap=lora if adapter == "lora" else None,
            **COMMON,
        )[0]

    return train


def worst(found: list[float], wanted: list[float]) -> float:
    """Largest relative difference of two whole sequences."""
    assert len(found) == len(wanted) == STEPS
    return max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_every_run_is_plain_torch(trained, plain, grid):
    """Whatever the stage, the accumulation, the layout and the number of ranks."""
    found = {
        case.name: worst(losses(trained / case.name), plain(case.adapter, case.layout))
        for case in grid
    }
    if grid is WHOLE:
        command = "pytest tests/distributed/test_same_loss.py --loss-grid=full"
        RESULT.write_text(
            json.dumps(
                {"command": command, "steps": STEPS, "worst": max(found.values()), "cases": found},
                indent=1,
            )
            + "\n"
        )
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


def test_the_part_has_every_pair_of_values():
    for i, j in combinations(range(len(Case._fields)), 2):
        assert {(case[i], case[j]) for case in PART} == {(case[i], case[j]) for case in WHOLE}, (
            Case._fields[i],
            Case._fields[j],
        )


@pytest.mark.slow
def test_checkpointed_blocks_give_the_same_losses(trained, plain):
    runs = sorted(trained.glob("checkpointed-*"))
    assert len(runs) == 4
    for run in runs:
        assert worst(losses(run), plain("full", "packed")) <= TOLERANCE, run
        told = metrics(run)[-1]
        assert told["tflops"] > 0 and ("recompute_tflops" in told) == ("selective" not in run.name)
        assert told["tflops"] > 3 * told.get(
            "recompute_tflops", 0.0
        )  # at most a forward less the head


@pytest.mark.slow
def test_bf16_stays_close_to_fp32(trained, plain, half_gptj):
    for stage in STAGES:
        assert (
            worst(losses(trained / f"bf16-stage{stage}"), plain("full", "packed", half_gptj))
            <= 1e-2
        ), stage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "stages", "wrap"), [("first", STAGES, None), ("first-lora", (2, 3), lora)]
)
def test_first_gradients_are_plain_torch(
    trained, small_gptj, unequal_documents, prefix, stages, wrap
):
    """Also proves the scale factor: a mean of means would be off by the ratio of token counts."""
    tokenizer = load_tokenizer(None)
    _, wanted = reference.train(
        small_gptj, unequal_documents, tokenizer, packing=True, wrap=wrap, **{**COMMON, "steps": 1}
    )
    for stage in stages:
        found = first_gradients(trained / f"{prefix}-stage{stage}")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = gradient.abs().max()
            assert (found[name] - gradient.flatten()).abs().max() <= TOLERANCE * scale, (
                stage,
                name,
            )


@pytest.mark.slow
def test_optimizer_bytes_are_divided(trained):
    """Stage 1 and up hold half of Adam's states on each of two ranks; stage 0 holds all of them."""
    held = {
        stage: json.loads((trained / f"first-stage{stage}" / "result.json").read_text())[
            "optimizer_bytes_per_rank"
        ]
        for stage in range(4)
    }
    whole = held[0][0]
    assert held[0] == [whole, whole]
    for stage in (1, 2, 3):
        # fp32 weights are their own masters at stage 0 only: 8 bytes a parameter there, 12 / 2 elsewhere.
        assert sum(held[stage]) == pytest.approx(whole * 12 / 8, rel=0.001)
        assert held[stage][0] == pytest.approx(held[stage][1], rel=0.001)
