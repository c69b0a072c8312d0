"""The choice: what fits, in which order, the largest micro-batch, and advice that holds when it is followed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_cases import CPU, GIB, TINY, config, gpu_machine, job

from finetune.config import (
    AdapterConfig,
    Config,
    FullConfig,
    LoraConfig,
    ModelConfig,
    Offload,
    TaskConfig,
    TrainConfig,
)
from finetune.errors import UserError
from finetune.planning.activations import activations
from finetune.planning.choose import Plan, all_options, plan
from finetune.planning.estimate import PARTS, Estimate, estimate
from finetune.planning.job import Option
from finetune.planning.machine import Machine
from finetune.planning.shape import ModelShape, load_shape
from finetune.planning.states import model_states
from finetune.training.sharding_plan import plan_run

SIX_B = load_shape("asset:gptj_6b")
FULL, LORA = FullConfig(), LoraConfig()


def six_b(adapter: AdapterConfig = FULL, **train: object) -> Config:
    settings = replace(
        TrainConfig(micro_batch=1, global_batch=64, activation_checkpointing=True), **train
    )  # type: ignore[arg-type]
    return Config(
        model=ModelConfig(path="asset:gptj_6b"), task=TaskConfig(), adapter=adapter, train=settings
    )


def planned(cfg: Config, gpus: int, gib: float, host_gib: float = 512) -> Plan:
    return plan(cfg, gpu_machine(gpus, gib, host_gib), SIX_B, gpus)


def chosen(cfg: Config, gpus: int, gib: float) -> Option:
    return planned(cfg, gpus, gib).chosen.option


@pytest.mark.parametrize(
    "adapter, gpus, gib, option",
    [
        (FULL, 1, 80, Option(1, "cpu")),
        (FULL, 1, 24, Option(3, "cpu")),
        (FULL, 2, 40, Option(2, "cpu")),
        (FULL, 4, 80, Option(1)),
        (FULL, 8, 40, Option(2)),
        (FULL, 8, 24, Option(3)),
        (LORA, 1, 24, Option(1)),
        (LORA, 8, 24, Option(1)),
        (LORA, 8, 12, Option(3)),
    ],
)
def test_six_billion_parameters(
    adapter: AdapterConfig, gpus: int, gib: float, option: Option
) -> None:
    assert chosen(six_b(adapter), gpus, gib) == option


def test_more_gpus_change_the_choice() -> None:
    assert len({chosen(six_b(), gpus, 80) for gpus in (1, 2, 8)}) > 1


def test_one_micro_step_and_nothing_to_shard_needs_no_sharding() -> None:
    assert chosen(six_b(LORA, global_batch=8), 8, 80) == Option(0)
    assert chosen(six_b(LORA, global_batch=1), 1, 80) == Option(0)
    assert chosen(six_b(LORA, global_batch=16), 8, 80) == Option(1), (
        "bf16 sums over micro-steps are not exact"
    )


def test_the_first_option_that_fits_is_taken() -> None:
    """Every option before the chosen one in the preference order is too large."""
    made = planned(six_b(), 8, 40)
    order = [Option(1), Option(2), Option(3)]
    by_option = {found.option: found for found in made.options}
    assert not any(by_option[option].fits for option in order[: order.index(made.chosen.option)])
    assert by_option[made.chosen.option].fits


def test_an_explicit_stage_is_kept_even_where_it_does_not_fit() -> None:
    cfg = six_b()
    cfg.zero.stage = 0
    made = planned(cfg, 1, 80)
    assert made.chosen.option == Option(0) and not made.fits
    assert any(advice.startswith("zero=auto:") for advice in made.advice)


def test_offloads_constrain_auto() -> None:
    cfg = six_b()
    cfg.zero.offload_optimizer = Offload.cpu
    assert chosen(cfg, 8, 80) == Option(1, "cpu")
    cfg.zero.offload_params = Offload.cpu
    assert chosen(cfg, 8, 80) == Option(3, "cpu", "cpu")


def test_nvme_is_offered_only_with_a_folder() -> None:
    cfg = six_b()
    assert not any("nvme" in str(found.option) for found in planned(cfg, 1, 24, 80).options)
    cfg.zero.nvme_path = "/local"
    machine = replace(gpu_machine(1, 24, 80), nvme_bytes=2000 * GIB)
    made = plan(cfg, machine, SIX_B, 1)
    assert made.fits and made.chosen.option.offload_optimizer == "nvme"
    assert made.chosen.disk_bytes > 16 * SIX_B.parameters()


def test_nothing_fits() -> None:
    made = planned(six_b(), 1, 16, 32)
    assert not made.fits and made.max_micro_batch == 0 and "No option fits" in made.reason
    assert made.chosen.gpu_bytes > 0 and made.advice


@pytest.mark.parametrize("gpus, gib, host", [(1, 24, 60), (2, 24, 60), (4, 16, 100)])
def test_advice_holds(gpus: int, gib: float, host: float) -> None:
    """Whatever the advice says fits, fits when it is done; one GPU fewer does not."""
    made = planned(six_b(), gpus, gib, host)
    assert not made.fits
    lora = [advice for advice in made.advice if advice.startswith("adapter=lora:")]
    assert lora and planned(six_b(LORA), gpus, gib, host).fits
    needed = re.search(r"machine\.gpus=(\d+)", "\n".join(made.advice))
    assert needed
    enough = int(needed[1])
    assert plan(six_b(), gpu_machine(enough, gib, host), SIX_B, enough).fits
    fewer = enough - (1 if enough <= 8 else 8)
    assert not plan(six_b(), gpu_machine(fewer, gib, host), SIX_B, fewer).fits


def test_advice_without_gpus_names_the_least_memory() -> None:
    cfg = six_b(micro_batch=4)
    made = plan(cfg, replace(CPU, host_bytes=8 * GIB), SIX_B, 1)
    needed = re.search(r"machine\.host_gib=(\d+)", "\n".join(made.advice))
    assert not made.fits and needed
    assert plan(cfg, replace(CPU, host_bytes=int(needed[1]) * GIB), SIX_B, 1).fits
    assert not plan(cfg, replace(CPU, host_bytes=(int(needed[1]) - 1) * GIB), SIX_B, 1).fits


def test_a_run_that_fits_nowhere_is_refused_with_the_table(tmp_path: Path) -> None:
    """Exit code 2: the command asks for what this machine cannot give. plan.json says the same."""
    cfg = six_b()
    cfg.machine.gpus, cfg.machine.host_gib = 0, 8
    with pytest.raises(UserError) as refusal:
        plan_run(cfg, SimpleNamespace(size=2), tmp_path, None)  # type: ignore[arg-type]
    assert refusal.value.exit_code == 2
    text = refusal.value.render()
    assert (
        "does not fit" in text
        and "NOTHING FITS" in text
        and "What would fit:" in text
        and "machine.host_gib=" in text
    )
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["fits"] is False and told["advice"]


@pytest.mark.parametrize("gpus, gib", [(1, 80), (8, 24), (8, 80)])
def test_largest_micro_batch(gpus: int, gib: float) -> None:
    cfg = six_b(LORA, micro_batch="auto", global_batch=24 * gpus, activation_checkpointing=False)
    made = planned(cfg, gpus, gib)
    assert made.fits and made.micro_batch == made.max_micro_batch
    assert 24 % made.micro_batch == 0
    assert made.micro_batch * made.accumulation * gpus == cfg.train.global_batch
    larger = [n for n in range(made.micro_batch + 1, 25) if 24 % n == 0]
    for micro in larger:
        assert not estimate(made.job.with_micro_batch(micro), made.chosen.option).fits


# ---------------------------------------------------------------------- numbers


def every_estimate() -> list[Estimate]:
    cases = [(FULL, 1, 1), (FULL, 4, 1), (LORA, 1, 1), (LORA, 2, 8), (FULL, 2, 32), (FULL, 1, 64)]
    plans = [planned(six_b(kind, micro_batch=micro), gpus, 80) for kind, gpus, micro in cases]
    tiny = config(LORA, dtype="fp32", micro_batch=4)
    plans.append(plan(tiny, CPU, ModelShape.from_config(TINY), 1))
    return [found for made in plans for found in made.options]


def test_parts_add_up() -> None:
    for found in every_estimate():
        assert set(found.parts) == set(PARTS)
        assert sum(found.parts.values()) == found.gpu_bytes, found
        assert all(size >= 0 for size in found.parts.values()), found
        # On a CPU at stage 2 the fitted slack is negative.
        on_cpu = "tensors" in found.host_parts
        assert found.tensor_bytes <= found.gpu_bytes or (on_cpu and found.option.stage == 2)
        assert sum(found.host_parts.values()) == found.host_bytes


@pytest.mark.parametrize(
    "option",
    [Option(0), Option(1), Option(2), Option(3), Option(2, "cpu"), Option(3, "cpu", "cpu")],
)
@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_bytes_grow_with_what_they_should(option: Option, kind: AdapterConfig) -> None:
    def need(
        length: int = 1024, micro: int = 1, checkpointing: bool = False, ranks: int = 2
    ) -> int:
        cfg = six_b(kind, micro_batch=micro, activation_checkpointing=checkpointing)
        cfg.task.max_length = length
        made = plan(cfg, gpu_machine(ranks, 80), SIX_B, ranks)
        return estimate(made.job, option).gpu_bytes

    for sizes in (
        [need(n) for n in (128, 256, 512, 1024, 2048)],
        [need(micro=n) for n in (1, 2, 4, 8)],
    ):
        assert all(small <= large for small, large in pairwise(sizes))
    assert need(checkpointing=True) <= need()
    assert need(micro=8, checkpointing=True) < need(micro=8)
    if option.stage:
        assert all(
            large <= small for small, large in pairwise([need(ranks=n) for n in (2, 4, 8, 16)])
        )


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    trained = SIX_B.trainable(LORA)
    for found in planned(six_b(LORA), 1, 80).options:
        states = model_states(planned(six_b(LORA), 1, 80).job, found.option)
        assert states.gradients + states.host_gradients <= 8 * trained + 64
        assert states.optimizer + states.host_optimizer <= 13 * trained + 2048


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_optimizer_states_fall_as_one_over_ranks(ranks: int) -> None:
    made = plan(six_b(), gpu_machine(ranks, 80), SIX_B, ranks)
    for stage in (1, 2, 3):
        size = model_states(made.job, Option(stage)).optimizer
        assert size == pytest.approx(12 * SIX_B.parameters() / ranks, rel=1e-5)


@pytest.mark.parametrize(
    "kind, checkpointing, gib",
    [(FULL, False, 6.17), (LoraConfig(targets="q_proj,v_proj"), False, 4.41), (FULL, True, 0.44)],
)
def test_activations_of_one_sequence(kind: AdapterConfig, checkpointing: bool, gib: float) -> None:
    """Saved tensors of GPT-J-6B at 2048 tokens, measured with hooks on the modules of one block times 28."""
    made = planned(six_b(kind, activation_checkpointing=checkpointing), 1, 80)
    assert activations(made.job).kept / GIB == pytest.approx(gib, rel=0.03, abs=0.04)


def test_a_large_evaluation_batch_counts() -> None:
    cfg = six_b(LORA, eval_batch=64)
    without = planned(cfg, 1, 80).chosen.gpu_bytes
    cfg.data.eval = "eval.jsonl"
    cfg.train.eval_batch = 1
    assert planned(cfg, 1, 80).chosen.gpu_bytes == without
    cfg.train.eval_batch = 64
    assert planned(cfg, 1, 80).chosen.gpu_bytes > without + 64 * 2048 * 8 * 4096 * 2


def test_host_memory_of_optimizer_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked blocks are powers of two, unless torch is told otherwise; the optimizer's groups are cut so that
    most of GPT-J's are (2^25 elements: two projections of 4096 x 4096)."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    job_ = planned(six_b(), 1, 80).job
    parts = estimate(job_, Option(2, "cpu")).host_parts
    assert sum(parts.values()) - parts["processes"] == pytest.approx(103.1 * GIB, rel=0.01)
    monkeypatch.setenv(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:64"
    )
    parts = estimate(job_, Option(2, "cpu")).host_parts
    assert sum(parts.values()) - parts["processes"] == pytest.approx(
        18 * SIX_B.parameters(), rel=0.01
    )


def test_ranks_on_a_cpu_share_the_host() -> None:
    cfg = config(FULL, ranks=2)
    made = plan(cfg, CPU, ModelShape.from_config(TINY), 2)
    assert {found.option for found in made.options} == {Option(stage) for stage in range(4)}
    assert made.chosen.host_bytes > 2 * made.chosen.gpu_bytes
    small = replace(CPU, host_bytes=made.chosen.host_bytes - 1)
    assert not estimate(job(cfg, small, 2), made.chosen.option).fits


def test_full_disk_is_noticed() -> None:
    machine = replace(gpu_machine(4, 80), disk_bytes=50 * GIB)
    made = plan(six_b(), machine, SIX_B, 4)
    assert not made.fits and made.chosen.short == "disk"
    assert (
        made.checkpoint_bytes == 12 * SIX_B.parameters()
        and made.export_bytes == 2 * SIX_B.parameters()
    )


@pytest.mark.parametrize(
    "change, key",
    [
        ({"dtype": "fp16"}, "model.dtype"),
        ({"stage": 2, "params": "cpu"}, "zero=stage3"),
        ({"stage": 0, "offload": "cpu"}, "zero=stage1"),
        ({"offload": "nvme"}, "zero.nvme_path"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(change: dict, key: str) -> None:
    with pytest.raises(UserError, match=re.escape(key)):
        plan(config(FULL, **change), CPU, ModelShape.from_config(TINY), 1)


def test_options_without_gpus_do_not_offload() -> None:
    assert all_options(job(config(FULL)), "/nvme") == [Option(0), Option(1), Option(2), Option(3)]


def test_the_plan_counts_on_a_default_of_deepspeed() -> None:
    from finetune.sharding import deepspeed_config
    from finetune.sharding.deepspeed_config import Sharding

    zero = deepspeed_config.build(config(FULL), Sharding(3), 1, cuda=False)["zero_optimization"]
    assert "sub_group_size" not in zero


def test_contract_of_the_json() -> None:
    found = planned(six_b(), 4, 80).to_json()
    assert found["fits"] is True
    assert set(found["chosen"]) == {"zero", "offload_optimizer", "offload_params"}
    assert {"gpus", "gpu_bytes", "host_bytes"} <= set(found["machine"])
    assert found["parameters"] == {"total": 6_050_882_784, "trainable": 6_050_882_784}
    keys = {
        "zero",
        "offload_optimizer",
        "offload_params",
        "gpu_bytes",
        "host_bytes",
        "disk_bytes",
        "fits",
        "parts",
    }
    for option in found["options"]:
        assert keys <= set(option) and set(option["parts"]) == set(PARTS)
    assert found["chosen"]["zero"] in {option["zero"] for option in found["options"]}


def test_machine_of_several_nodes() -> None:
    machine = Machine(16, 8, 24 * GIB, 400 * GIB, 5000 * GIB)
    made = plan(six_b(), machine, SIX_B, 16)
    assert machine.nodes == 2 and made.job.ranks_per_node == 8 and made.fits
