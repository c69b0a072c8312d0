"""Trained runs of every kind, made once."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.export.matrix import FULL, PART, Case, train


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> list[Case]:
    return FULL if request.config.getoption("--export-matrix") == "full" else PART


@pytest.fixture(scope="session")
def runs(
    small_gptj: Path, cases: list[Case], tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Path:
    """Folder with a run of each case, named by the case; the first worker that asks trains for all."""
    if worker_id == "master":
        folder = tmp_path_factory.mktemp("exports")
        train(cases, small_gptj, folder)
        return folder
    folder = tmp_path_factory.getbasetemp().parent / "exports"
    folder.mkdir(exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            train(cases, small_gptj, folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def find_run(runs: Path, cases: list[Case]):
    """find_run(head, adapter): the folder of the first such run."""

    def find(head: str, adapter: str) -> Path:
        return runs / next(
            case.name for case in cases if case.head == head and case.adapter == adapter
        )

    return find
