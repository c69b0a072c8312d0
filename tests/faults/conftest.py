"""One zygote for each module of fault tests, which says in `jobs(folder)` which runs it needs.

FAULTS=all      every point of a save at every stage, also in the background: a few minutes more
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.jobs import prepare, run_jobs

EVERYTHING = os.environ.get("FAULTS") == "all"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, folder: Path, small_disk) -> dict[str, dict]:
    """What became of every run of the module, by name."""
    return run_jobs(request.module.jobs(folder), folder / f"out-{request.module.__name__}")


@pytest.fixture(scope="session")
def small_disk(folder: Path):
    """A disk of 48 MiB in `folder`, or None where this user may not mount one."""
    place = folder / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    yield place if made.returncode == 0 else None
    if made.returncode == 0:
        subprocess.run(["umount", "-l", str(place)], check=False)
