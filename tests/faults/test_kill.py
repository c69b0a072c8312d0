"""kill -9 of a rank inside a save of two ranks: the run continues from a whole checkpoint, to the same numbers.

Runs of one stage follow each other in one directory: each continues where the one before was killed, and is killed at
the next point. The last one is left alone, and must end as if nothing had ever happened.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import EVERYTHING
from tests.faults.jobs import STEPS, words

FIRST = ("save.renamed", 0, 1)
BY_BOTH = [
    ("save.begin", 1),
    ("save.tensor", 1),
    ("save.tensor", 9),
    ("save.tensor", 20),
    ("save.fsync", 1),
    ("save.written", 1),
]
BY_RANK0 = [
    ("save.gathered", 1),
    ("save.state", 1),
    ("save.manifest", 1),
    ("save.rename", 1),
    ("save.renamed", 1),
    ("save.discard", 1),
]
ALL = [(point, rank, nth) for point, nth in BY_BOTH for rank in (0, 1)] + [
    (point, 0, nth) for point, nth in BY_RANK0
]
LEADING_RANK_WRITES = [point for point in ALL if point[:2] != ("save.tensor", 1) or point[2] == 1]
"""Stage 0: every rank has the same states, so rank 1's file is a header alone."""
SOME = [
    ("save.tensor", 0, 9),
    ("save.tensor", 1, 1),
    ("save.manifest", 0, 1),
    ("save.rename", 0, 1),
]
CHAINS = {
    "stage0": (["zero=stage0"], LEADING_RANK_WRITES if EVERYTHING else SOME),
    "stage2": (
        ["zero=stage2"],
        ALL
        if EVERYTHING
        else [
            *SOME,
            ("save.fsync", 1, 1),
            ("save.written", 1, 1),
            ("save.gathered", 0, 1),
            ("save.state", 0, 1),
            ("save.discard", 0, 1),
        ],
    ),
    "stage3": (["zero=stage3"], ALL if EVERYTHING else SOME),
    "background": (["zero=stage2", "checkpoint.background=true"], ALL if EVERYTHING else SOME[:3]),
}


def at(chain: str, point: str, rank: int, nth: int) -> str:
    return f"kill-{chain}-{point}-{rank}-{nth}"


def jobs(folder: Path) -> list[dict]:
    found = []
    for chain, (more, points) in CHAINS.items():
        run = words(folder, folder / f"kill-{chain}", *more)
        if chain != "background":
            found.append(
                {"name": f"whole-{chain}", "words": words(folder, folder / f"whole-{chain}", *more)}
            )
        found.append(
            {"name": f"kill-{chain}-first", "words": run, "fault": "kill save.renamed rank=0"}
        )
        found += [
            {
                "name": at(chain, *point),
                "words": run,
                "fault": f"kill {point[0]} rank={point[1]} nth={point[2]}",
            }
            for point in points
        ]
        found.append({"name": f"kill-{chain}-end", "words": run})
    return found


CASES = [(chain, *point) for chain, (_, points) in CHAINS.items() for point in points]


@pytest.mark.slow
@pytest.mark.fault(
    happens="`kill -9` of either rank at any write of a save",
    then="the previous checkpoint (or the new one, once renamed) is intact; the other rank ends with 1 and "
    "names the dead one",
)
@pytest.mark.parametrize(("chain", "point", "rank", "nth"), CASES)
def test_a_kill_inside_a_save_loses_nothing_complete(outcome, chain, point, rank, nth):
    names = [name for name in outcome if name.startswith(f"kill-{chain}-")]
    name = at(chain, point, rank, nth)
    before, found = outcome[names[names.index(name) - 1]], outcome[name]
    assert found["codes"][str(rank)] == -9, found["output"]
    assert found["codes"][str(1 - rank)] == 1 and not found["timeout"], found["output"]
    assert found["seconds"] < 60
    assert found["damaged"] == {} and max(found["valid"]) >= max(before["valid"]) > 0
    assert (
        found["result"]["status"] == "failed"
        and f"rank {rank} (process" in found["result"]["error"]
    )
    assert f"rank {rank} (process" in found["output"][1 - rank]


@pytest.mark.slow
@pytest.mark.fault(
    happens="the run that was killed at each of these points is started again",
    then="losses and final states are bit for bit those of an undisturbed run",
)
@pytest.mark.parametrize("chain", CHAINS)
def test_after_all_kills_the_run_is_the_undisturbed_one(outcome, folder, chain):
    end, whole = (
        outcome[f"kill-{chain}-end"],
        outcome[f"whole-{chain if chain != 'background' else 'stage2'}"],
    )
    assert end["codes"] == {"0": 0, "1": 0} == whole["codes"], end["output"]
    assert end["losses"] == whole["losses"] and len(end["losses"]) == STEPS
    assert end["staging"] == [] and end["damaged"] == {}
    assert hashes(folder / f"kill-{chain}") == hashes(
        folder / f"whole-{chain if chain != 'background' else 'stage2'}"
    )


def hashes(run_dir: Path) -> dict[str, str]:
    """Of the last checkpoint's tensor files, which hold weights and both averages."""
    manifest = json.loads((run_dir / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    return {
        name: entry["hash"] for name, entry in manifest["files"].items() if name.startswith("optim")
    }
