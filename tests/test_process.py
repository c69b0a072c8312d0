"""Threads sleep soon where nobody said how they are to wait."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest

from finetune.dist import collective_timeout
from finetune.process import ROUNDS, spin_briefly
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"GOMP_SPINCOUNT": ROUNDS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_is_set_stays(given, wanted):
    environ = dict(given)
    spin_briefly(environ)
    assert environ == wanted


def test_before_torch_is_imported():
    code = (
        "import sys, os; from finetune.cli.app import main;"
        "main('plan', ['recipe=quickstart', 'machine=h100_80']);"
        "print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))
    }
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[-2:] == ["False", ROUNDS]


GROUPS = """
import torch
from finetune import dist
dist.connect(1, hang_timeout=7200)
from deepspeed.comm.torch import TorchBackend
for group in (torch.distributed.group.WORLD, TorchBackend.new_group(None, [0])):
    print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
dist.disconnect()
"""


def test_no_collective_times_out_before_the_hang_watch():
    """Neither in our group nor in those that DeepSpeed makes, whose timeout would be torch's default."""
    found = subprocess.run(
        [sys.executable, "-c", GROUPS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [float(line) for line in found.stdout.splitlines()[-2:]] == [7800, 7800], found.stdout
    assert collective_timeout(3) > timedelta(minutes=10) and collective_timeout(0).days == 7
