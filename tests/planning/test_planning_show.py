"""Table and picture: every option is there, columns are aligned, and the picture is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config import FullConfig, LoraConfig
from finetune.planning.show import align, draw, render_table
from tools.readme_table import plan_6b, readme_table


def test_table_shows_every_option_and_marks_the_chosen_one() -> None:
    made = plan_6b(8, 24, FullConfig())
    lines = render_table(made).splitlines()
    rows = [line for line in lines if line.endswith(("fits", "too small"))]
    assert len(rows) == len(made.options)
    marked = [line for line in rows if line.startswith("->")]
    assert len(marked) == 1 and f"{made.chosen.gpu_bytes / 2**30:.2f}" in marked[0]
    assert len({line.index("fits") for line in rows if line.endswith("fits")}) == 1
    assert max(map(len, rows)) <= 120
    assert f"train.micro_batch={made.max_micro_batch}" in render_table(made)


def test_table_of_a_misfit_says_what_would_fit() -> None:
    text = render_table(plan_6b(1, 3, FullConfig()))
    assert "NOTHING FITS" in text and "What would fit:" in text and "adapter=lora" in text


def test_align() -> None:
    assert align([["a", "1"], ["bbb", "22"]], left=(0,)) == ["a     1", "bbb  22"]


@pytest.mark.parametrize(
    "gpus, gib, adapter", [(4, 80, FullConfig()), (1, 24, LoraConfig()), (1, 4, FullConfig())]
)
def test_picture(tmp_path: Path, gpus: int, gib: int, adapter: object) -> None:
    file = tmp_path / "plan.png"
    draw(plan_6b(gpus, gib, adapter), file)  # type: ignore[arg-type]
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 20_000


def test_readme_table() -> None:
    lines = readme_table().splitlines()
    assert len(lines) == 6 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "2", "4", "8"]
