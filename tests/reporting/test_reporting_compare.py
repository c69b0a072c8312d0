"""The page that compares runs, and what sets a run apart from its recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.cli.app import compose_config
from finetune.cli.report import run, run_folders
from finetune.compose import compose_train, recipe_config
from finetune.config import plain_config
from finetune.errors import UserError
from finetune.reporting.page.compare import build_comparison, page_context, run_names
from finetune.reporting.page.files import read_run
from finetune.reporting.page.tables import from_recipe
from tests.reporting.run_folders import make_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    runs = [make_run(root / "a"), make_run(root / "b", steps=60, status="failed")]
    config = runs[1] / "config.yaml"
    text = config.read_text().replace("name: quickstart", "name: <b>other")
    config.write_text(text.replace("lr: 0.005", "lr: 0.001"))
    return runs


def test_a_page_has_both_runs_and_asks_nothing_of_the_network(pair, tmp_path):
    page = build_comparison(pair, tmp_path / "compare.html").read_text()
    assert "optim.lr" in page and "0.005" in page and "0.001" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page) and "<script>alert(" not in page
    assert page.count('class="line s2') >= 4, "the second run has a line in every chart"


def test_the_best_run_is_marked_and_numbers_are_the_files(pair):
    context = page_context([read_run(folder) for folder in pair])
    results = context["results"]
    assert [row[0] for row in results.rows] == ["a", "b"] and results.best == 0
    assert (
        results.rows[1][1:3] == ["failed", "60"]
        and results.rows[0][results.head.index("eval loss")] == "2.3000"
    )


def test_settings_that_are_the_same_are_left_out(pair):
    rows = page_context([read_run(folder) for folder in pair])["settings"].rows
    assert {row[0]: row[1:] for row in rows} == {
        "optim.lr": ["0.005", "0.001"],
        "train.steps": ["200", "60"],
    }


def test_jobs_of_a_sweep_are_named_by_what_varied(tmp_path):
    for n in range(2):
        make_run(tmp_path / str(n), steps=3)
        (tmp_path / f"{n}/job.json").write_text(
            json.dumps({"chosen": {"optim.lr": f"1e-{n}", "adapter.rank": "4"}})
        )
    names = run_names([read_run(tmp_path / str(n)) for n in range(2)])
    assert names == ["0: lr=1e-0 rank=4", "1: lr=1e-1 rank=4"]


def test_run_directories_by_pattern(pair, tmp_path):
    assert run_folders(str(pair[0].parent / "*")) == pair
    with pytest.raises(UserError, match="not a run directory"):
        run_folders(str(tmp_path))


def test_words_of_the_program(pair, tmp_path):
    def runs(*words: str) -> list[str]:
        return compose_config(list(words), "report").config.runs

    assert (
        runs("run=a", "run=b c") == ["a", "b c"]
        and runs("runs=x/*") == ["x/*"]
        and runs("runs=[a,b]") == ["a", "b"]
    )
    out = tmp_path / "both.html"
    assert (
        run(compose_config([f"run={pair[0]}", f"run={pair[1]}", f"out={out}"], "report")) == 0
        and out.is_file()
    )
    with pytest.raises(UserError, match="name a run"):
        run(compose_config([], "report"))


def test_differences_from_the_recipe():
    config = plain_config(compose_train(["recipe=quickstart", "optim.lr=0.5", "run_dir=x"]))
    found = from_recipe(config, recipe_config("quickstart"))
    assert found is not None and found.rows == [["optim.lr", "0.01", "0.5"]]
    assert (
        from_recipe(
            plain_config(compose_train(["recipe=quickstart"])), recipe_config("quickstart")
        ).rows
        == []
    )
    assert recipe_config("gone") is None and from_recipe({"name": "gone"}, None) is None
