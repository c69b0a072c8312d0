"""Ranks that fail, die, hang; gradients that are not finite; a disk that fills up; two runs in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.training.hang_watch import spike
from tests.faults.jobs import STEPS, words

STAGES = ("stage0", "stage2", "stage3")
SKIPPED = [3, 4, 7]


def jobs(folder: Path) -> list[dict]:
    def run(name: str, *more: str, **others) -> dict:
        return {
            "name": name,
            "words": words(folder, folder / name.replace(" ", "-"), *more),
            **others,
        }

    found = [
        run(f"skip {stage}", f"zero={stage}", nan={"rank": 1, "steps": SKIPPED}) for stage in STAGES
    ]
    found += [
        run("row", "zero=stage2", nan={"rank": 0, "steps": [4, 5, 6, 7, 8]}),
        run("row", "zero=stage2"),
        run("first", "zero=stage2", "train.max_skipped=2", nan={"rank": 0, "steps": [1, 2]}),
        run("raise", "zero=stage2", fault="fail step rank=1 nth=4"),
        run("die 0", "zero=stage3", fault="kill step rank=0 nth=4"),
        run("die 1", "zero=stage2", fault="kill step rank=1 nth=4"),
        run("hang", "zero=stage2", "train.hang_timeout=3", fault="stop step rank=1 nth=4"),
        run("no space 0", "zero=stage2", fault="nospace save.tensor rank=0 nth=3"),
        run(
            "no space behind",
            "zero=stage2",
            "checkpoint.background=true",
            fault="nospace save.manifest rank=0",
        ),
    ]
    found[4]["name"] = "row again"
    if (folder / "disk").is_mount():
        disk, filler = folder / "disk", folder / "disk/filler"
        full = words(folder, disk / "run", "zero=stage2")
        found += [
            {
                "name": "disk fills",
                "words": full,
                "fill": {"point": "save.written", "rank": 0, "file": str(filler)},
            },
            {"name": "disk is full", "words": full},
            {
                "name": "disk fills while writing",
                "words": full,
                "remove": [str(filler)],
                "fill": {"point": "save.tensor", "rank": 1, "file": str(filler)},
            },
            {"name": "disk is free", "words": full, "remove": [str(filler)]},
        ]
    return found


def failed(found: dict, *texts: str) -> None:
    assert 1 in found["codes"].values() and not found["timeout"], found["output"]
    assert found["seconds"] < 60 and found["result"]["status"] == "failed"
    assert found["damaged"] == {}
    for text in texts:
        assert text in found["result"]["error"], found["result"]["error"]


@pytest.mark.slow
@pytest.mark.fault(
    happens="a loss that is not finite on one rank",
    then="no rank applies the step; it is counted, and its data positions are reported; training continues",
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_changes_nothing(outcome, stage):
    found = outcome[f"skip {stage}"]
    assert found["codes"] == {"0": 0, "1": 0}, found["output"]
    assert found["result"]["skipped_steps"] == 3 and found["bad"] == SKIPPED
    assert all(
        found["losses"][str(step)] > 0 for step in range(1, STEPS + 1) if step not in SKIPPED
    )
    # Two ranks, batch 4, micro-batch 1: rank 1 has the odd positions.
    assert (
        "step 3: the loss is not finite; the update is skipped, 1 so far. Positions 9, 11 "
        in found["output"][0]
    )


@pytest.mark.slow
@pytest.mark.fault(
    happens="`train.max_skipped` steps in a row that are not finite",
    then="exit code 1; the state of the last good step is saved; with good data, the run continues from it",
)
def test_too_many_in_a_row_end_the_run_at_the_last_good_step(outcome):
    found = outcome["row"]
    failed(found, "5 steps in a row had no finite gradient", "step 6 holds")
    again = outcome["row again"]
    assert again["codes"] == {"0": 0, "1": 0} and again["bad"] == [4, 5, 6], again["output"]


@pytest.mark.slow
def test_nothing_is_saved_when_no_step_was_good(outcome):
    found = outcome["first"]
    failed(found, "2 steps in a row had no finite gradient")
    assert found["valid"] == []


@pytest.mark.slow
@pytest.mark.fault(
    happens="an exception on one rank",
    then="all ranks end with 1 within a minute; the error in result.json is that rank's message",
)
def test_the_failing_rank_is_heard(outcome):
    failed(outcome["raise"], "rank 1 ended first: RuntimeError: injected at step")
    assert outcome["raise"]["codes"] == {"0": 1, "1": 1}
    assert "RuntimeError: injected at step" in outcome["raise"]["output"][1]
    assert "Connection closed" not in outcome["raise"]["output"][0]


@pytest.mark.slow
@pytest.mark.fault(
    happens="`kill -9` of a rank during a step",
    then="the other ranks end with 1 within a minute and name the dead one",
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_takes_the_others_along(outcome, rank):
    found = outcome[f"die {rank}"]
    failed(found, f"rank {rank} (process", "was killed")
    assert found["codes"] == {str(rank): -9, str(1 - rank): 1} and found["valid"] == [2]
    assert "was killed and left no word" in found["output"][1 - rank]


@pytest.mark.slow
@pytest.mark.fault(
    happens="a rank hangs (`train.hang_timeout`)",
    then="every rank dumps its stacks to a file and stderr; exit code 1",
)
def test_a_hang_dumps_every_rank_and_ends(outcome):
    found = outcome["hang"]
    failed(found, "no step for 3 seconds")
    assert found["codes"] == {"0": 1, "1": 1}
    for rank, place in enumerate(("trainer.py", "faults.py")):
        assert (
            place in found["stacks"][f"stacks-rank-{rank:05d}.txt"]
            and place in found["output"][rank]
        )


@pytest.mark.slow
@pytest.mark.fault(
    happens="no space left on the disk (injected), also during a background save",
    then="exit code 1; the temporary folder is removed, earlier checkpoints are intact",
)
@pytest.mark.parametrize("name", ["no space 0", "no space behind"])
def test_no_space_is_cleaned_up(outcome, name):
    found = outcome[name]
    if name == "no space behind":
        # An OSError that is no longer rank 0's alone: it is told at the next step or the end.
        failed(found, "the checkpoint of step 2 could not be written", "No space left")
    else:
        failed(found, "the checkpoint of step 2 could not be written", "rank 0", "No space left")
    assert found["staging"] == [] and found["valid"] == []


@pytest.mark.slow
@pytest.mark.fault(
    happens="a full disk (a mounted one of 48 MiB), before and while a checkpoint is written",
    then="exit code 2 before, 1 while; the message says how much is missing; no temporary folder is left, "
    "earlier checkpoints are intact; with enough room, the run continues",
)
def test_a_full_disk_keeps_what_is_there(outcome, small_disk, cases):
    if small_disk is None:
        pytest.skip("this user may not mount a disk")
    cases(3)
    first, second, third, last = (
        outcome[f"disk {name}"] for name in ("fills", "is full", "fills while writing", "is free")
    )
    failed(first, "the checkpoint of step 2 could not be written", "No space left on device")
    assert first["valid"] == [] and first["staging"] == []
    # The plan sees before anything is loaded that the checkpoints have no room.
    assert second["codes"] == {"0": 2, "1": 2}, second["output"]
    assert "free disk space: it needs" in second["result"]["error"]
    assert second["valid"] == [] and second["staging"] == []
    failed(third, "could not be written", "No space left on device")
    assert third["staging"] == []
    assert last["codes"] == {"0": 0, "1": 0} and last["damaged"] == {}, last["output"]


def test_a_spike_is_told_from_noise():
    recent: list[float] = []
    noise = [3.0 + 0.05 * ((7 * i) % 11 - 5) / 5 for i in range(40)]
    assert not any(spike(recent, loss) for loss in noise)
    assert len(recent) == 32
    assert not spike(recent, 3.2) and spike(recent, 3.9) and not spike(recent, 2.0)


def test_the_first_losses_are_never_spikes():
    recent: list[float] = []
    assert not any(spike(recent, loss) for loss in (11.0, 900.0, 2.0, 50.0))


def test_a_second_run_in_the_same_directory_is_refused(tmp_path, monkeypatch):
    from finetune.errors import RunFailed
    from finetune.training import run_dir

    monkeypatch.setattr(run_dir, "PATIENCE_SECONDS", 0.3)
    first, second = run_dir.RunLock(tmp_path), run_dir.RunLock(tmp_path)
    first.take()
    said: list[str] = []
    with pytest.raises(RunFailed, match=r"another run is at work here: process \d+"):
        second.take(said.append)
    assert len(said) == 1
    first.release()
    second.take()
    second.release()
