"""Threads sleep soon where nobody said how they are to wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
