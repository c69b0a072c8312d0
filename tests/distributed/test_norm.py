"""The gradient's norm by rows is the norm, also of what fills no row, and of what is not finite."""

from __future__ import annotations

import pytest
import torch

from finetune.sharding.deepspeed_patches import NORM_PIECE, NORM_ROW, row_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, NORM_ROW - 1, NORM_ROW, NORM_PIECE["cpu"] + 3 * NORM_ROW + 17])
def test_norm_of_the_rows_norms(size, dtype):
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(
        row_norms(gradient).double().norm(), gradient.double().norm(), rtol=1e-6, atol=0
    )


def test_a_matrix_is_taken_as_it_lies():
    gradient = torch.randn(70, 33).T
    torch.testing.assert_close(
        row_norms(gradient).double().norm(), gradient.double().norm(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    gradient = torch.ones(5000)
    gradient[4000] = bad
    assert not row_norms(gradient).norm().isfinite()
