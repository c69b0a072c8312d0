"""A checkpoint of any stage, offload and number of ranks continues in any other: the same numbers, bit for bit.

One checkpoint travels through a chain of settings, each of which loads it and writes it again; every link must hold the
same masters and moments. From the first checkpoint each setting also trains 20 steps on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.jobs import prepare, run_jobs, words

CUT, STEPS = 4, 24
CPU, PARAMS = "zero.offload_optimizer=cpu", "zero.offload_params=cpu"
CHAIN = [
    (2, "zero=stage1"),
    (2, "zero=stage3"),
    (2, "zero=stage2"),
    (1, "zero=stage0"),
    (2, "zero=stage2", CPU),
    (1, "zero=stage3"),
    (2, "zero=stage3", CPU, PARAMS),
    (4, "zero=stage3"),
    (2, "zero=stage0"),
    (2, "zero=stage3"),
]
FROM_1, FROM_4 = CHAIN.index((1, "zero=stage3")), CHAIN.index((4, "zero=stage3"))
TARGETS = [
    (None, 2, "zero=stage1"),
    (None, 2, "zero=stage2"),
    (None, 2, "zero=stage3"),
    (None, 2, "zero=stage2", CPU),
    (None, 1, "zero=stage2"),
    (None, 4, "zero=stage3"),
    (FROM_1, 2, "zero=stage2"),
    (FROM_4, 2, "zero=stage3", PARAMS),
]
"""(link of the chain whose checkpoint it continues from, or None: the first one; ranks; settings)."""


def title(setting: tuple) -> str:
    return "-".join([f"{setting[0]}-ranks", *(word.split("=")[1] for word in setting[1:])])


def path(target: tuple) -> str:
    origin = CHAIN[target[0]] if target[0] is not None else (2, "zero=stage0")
    return f"{title(origin)}-to-{title(target[1:])}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    folder = prepare(tmp_path_factory.mktemp("elastic"))

    def job(name: str, ranks: int, *more: str) -> dict:
        return {
            "name": name,
            "ranks": ranks,
            "words": words(
                folder,
                folder / name,
                "optim.lr=1e-3",
                "checkpoint.every=0",
                "optim.schedule=constant",
                f"train.steps={STEPS}",
                *more,
            ),
        }

    first = folder / f"start/checkpoints/step-{CUT:08d}"
    jobs = [job("start", 2, "zero=stage0", f"train.steps={CUT}"), job("whole", 2, "zero=stage0")]
    before = first
    for n, (ranks, *more) in enumerate(CHAIN):
        jobs.append(job(f"link-{n}", ranks, *more, f"train.steps={CUT}", f"resume={before}"))
        before = folder / f"link-{n}/checkpoints/step-{CUT:08d}"
    for origin, ranks, *more in TARGETS:
        source = first if origin is None else folder / f"link-{origin}/checkpoints/step-{CUT:08d}"
        jobs.append(job(path((origin, ranks, *more)), ranks, *more, f"resume={source}"))
    return folder, run_jobs(jobs, folder / "out")


def whole_tensors(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) -> all its elements, put together from every rank's file."""
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for file in (run_dir / f"checkpoints/step-{CUT:08d}").glob("optim-*.safetensors"):
        for key, tensor in load_file(file).items():
            name, start, kind = key.rsplit("|", 2)
            parts.setdefault((name, kind), {})[int(start)] = tensor
    return {
        key: torch.cat([pieces[start] for start in sorted(pieces)]) for key, pieces in parts.items()
    }


@pytest.mark.slow
@pytest.mark.fault(
    happens="another number of ranks (1, 2, 4), another ZeRO stage, other offload",
    then="master weights and Adam's moments are restored bit for bit; the next 20 losses agree to 1e-5",
)
@pytest.mark.parametrize("n", range(len(CHAIN)), ids=lambda n: f"{n}-{title(CHAIN[n])}")
def test_states_travel_bit_for_bit(results, n):
    folder, outcome = results
    found = outcome[f"link-{n}"]
    assert set(found["codes"].values()) == {0} and found["result"]["step"] == CUT, found["output"]
    assert found["result"]["world_size"] == CHAIN[n][0]
    wanted, got = whole_tensors(folder / "start"), whole_tensors(folder / f"link-{n}")
    assert got.keys() == wanted.keys() and len(wanted) > 40
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key
    assert any(
        tensor.abs().sum() > 0 for (_, kind), tensor in wanted.items() if kind == "exp_avg_sq"
    )


@pytest.mark.slow
@pytest.mark.fault(
    happens="another number of ranks (1, 2, 4), another ZeRO stage, other offload",
    then="master weights and Adam's moments are restored bit for bit; the next 20 losses agree to 1e-5",
)
@pytest.mark.parametrize("target", TARGETS, ids=path)
def test_losses_go_on(results, target):
    _, outcome = results
    found, wanted = outcome[path(target)], outcome["whole"]["losses"]
    assert set(found["codes"].values()) == {0}, found["output"]
    assert list(found["losses"]) == [str(step) for step in range(CUT + 1, STEPS + 1)]
    for step, loss in found["losses"].items():
        assert loss == pytest.approx(wanted[step], rel=1e-5), step
