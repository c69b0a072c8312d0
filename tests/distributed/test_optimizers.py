"""AdamW in 8 bits and Adafactor: the losses of bitsandbytes' and torch's own, and the same run after a resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from finetune.check import check
from finetune.compose import compose_train
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import UserError
from finetune.sharding import optimizers
from tests.distributed import reference
from tests.distributed.ranks import losses, run_cases

STEPS, CUT, LENGTH, BATCH = 6, 3, 32, 8
COMMON = dict(steps=STEPS, global_batch=BATCH, length=LENGTH, weight_decay=0.1, clip=1.0, seed=3)
RATES = {"adamw8bit": 2e-3, "adafactor": 5e-2}
CASES = {
    "adamw8bit-stage0-1": "zero=stage0 train.micro_batch=4",
    "adamw8bit-stage2-2": "zero=stage2 train.micro_batch=2",
    "adamw8bit-stage3-2": "zero=stage3 train.micro_batch=4",
    "adamw8bit-bf16_stage1-2": "zero=stage1 train.micro_batch=2 model.dtype=bf16",
    "adafactor-stage0-1": "zero=stage0 train.micro_batch=4",
    "adafactor-bf16_stage0-2": "zero=auto train.micro_batch=4 model.dtype=bf16",
}
"""Optimizer, stage and ranks -> the rest of the run."""
SAME, BLOCKS, BF16 = 1e-5, 2e-3, 1e-2
"""Tolerances: the same blocks; blocks cut from flat tensors of several weights; bf16."""


@pytest.fixture(scope="module")
def trained(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("optimizers")

    def case(name: str, *words: str, of: str = "") -> list[str]:
        optimizer = (of or name).split("-")[0]
        return [
            "recipe=clm_pile", f"model.path={pocket_gptj}", "model.dtype=fp32",
            f"data.train={unequal_documents}", f"run_dir={root / name}",
            f"task.max_length={LENGTH}", f"train.steps={STEPS}", f"train.global_batch={BATCH}",
            "seed=3", f"optim.name={optimizer}", f"optim.lr={RATES[optimizer]}",
            "optim.weight_decay=0.1", "optim.betas=[0.9,0.999]", "optim.warmup=0",
            "optim.min_lr=0", "train.eval_every=0", "export.enabled=false",
            "train.activation_checkpointing=false", f"checkpoint.every={CUT}", *words,
        ]  # fmt: skip

    def resumed(name: str, of: str, *words: str) -> list[str]:
        start = root / of / "checkpoints" / f"step-{CUT:08d}"
        return case(name, *CASES[of].split(), f"resume={start}", *words, of=of)

    cases = {name: case(name, *words.split()) for name, words in CASES.items()}
    two = [words for name, words in cases.items() if name[-1] == "2"]
    one = [words for name, words in cases.items() if name[-1] == "1"]
    two += [resumed(f"again-{n}", n) for n in CASES if n[-1] == "2"]
    one += [resumed(f"again-{n}", n) for n in CASES if n[-1] == "1"]
    one += [resumed("elsewhere", "adamw8bit-stage2-2", "zero=stage0", "train.micro_batch=4")]
    run_cases(2, two)
    run_cases(1, one)
    return root


@pytest.fixture(scope="module")
def plain(pocket_gptj: Path, unequal_documents: Path) -> dict[str, list[float]]:
    """Losses of the optimizers' own classes on Hugging Face's GPT-J, in fp32."""
    classes = {"adamw8bit": AdamW8bit, "adafactor": partial(torch.optim.Adafactor, foreach=False)}
    tokenizer = load_tokenizer(str(pocket_gptj))
    return {
        name: reference.train(
            pocket_gptj, unequal_documents, tokenizer, packing=True, lr=RATES[name],
            make_optimizer=make, **COMMON,
        )[0]
        for name, make in classes.items()
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_optimizer_itself(trained, plain, name):
    optimizer, stage, _ = name.split("-")
    tolerance = BF16 if "bf16" in stage else SAME if stage == "stage0" else BLOCKS
    wanted = plain[optimizer]
    assert losses(trained / name) == pytest.approx(wanted, rel=tolerance)
    assert wanted[-1] < wanted[0] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_same_run(trained, name):
    assert losses(trained / f"again-{name}") == losses(trained / name)[CUT:]


@pytest.mark.slow
def test_8_bit_moments_go_on_at_another_stage_and_on_other_ranks(trained):
    whole = losses(trained / "adamw8bit-stage2-2")
    assert losses(trained / "elsewhere") == pytest.approx(whole[CUT:], rel=BLOCKS)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9])
def test_dequantised_moments_quantise_to_themselves(scale):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(256 * 500 + 17))
    optimizer = AdamW8bit([parameter], lr=1e-3)
    optimizers.create_states(optimizer, parameter)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter) * torch.rand_like(parameter) * scale
        parameter.grad[:600] = 0.0  # two blocks and a part, as of words that the data do not have
        optimizer.step()
    state = optimizer.state[parameter]
    before = {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
    with optimizers.moments(optimizer, parameter, write=True) as moments:
        saved = {key: value.clone() for key, value in moments.items()}
    for key, value in before.items():
        first = 3 if "absmax" in key else 3 * 256  # whatever the codes of a block of zeros are
        assert torch.equal(state[key][first:], value[first:]), key
    with optimizers.moments(optimizer, parameter, write=False) as moments:
        assert all(torch.equal(moments[key], value) for key, value in saved.items())


@pytest.mark.parametrize(
    "words, problem",
    [
        (["optim.name=adafactor", "zero=stage2"], "adafactor needs whole matrices"),
        (["optim.name=adamw8bit", "zero=stage2", "zero.offload_optimizer=cpu"], "adamw8bit keeps"),
    ],
)
def test_what_an_optimizer_cannot_is_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        check(compose_train(["recipe=clm_pile", "debug=tiny", *words]), 1, True)
