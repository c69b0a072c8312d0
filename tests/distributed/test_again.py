"""The same run directory once more: what the run before left there is told once, and no longer than it is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import metrics, run_cases


@pytest.mark.slow
def test_a_run_that_starts_anew_in_its_directory_has_each_step_once(
    pocket_gptj: Path, unequal_documents: Path, tmp_path
):
    rows = [json.loads(line) for line in unequal_documents.read_text().splitlines()]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"txt": "no text"}]))
    words = [
        "recipe=clm_pile",
        f"model.path={pocket_gptj}",
        f"data.train={data}",
        f"data.eval={unequal_documents}",
        "data.on_bad_row=skip",
        "task.max_length=64",
        "train.steps=2",
        "train.micro_batch=2",
        "train.global_batch=2",
        "train.eval_at_start=true",
        "train.eval_every=1",
        "export.enabled=false",
        "checkpoint.every=0",
        "train.activation_checkpointing=false",
        f"run_dir={tmp_path / 'run'}",
        "adapter=lora",
    ]
    run_cases(1, [words, [*words, "resume=never"]])
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [0, 1, 2]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["bad_rows"], result["bad_eval_rows"]) == ("done", 1, 0)
    # Other weights under the same name are not the base that the checkpoint belongs to.
    with pytest.raises(AssertionError, match="weights: was"):
        run_cases(
            1,
            [
                [
                    *words,
                    f"model.path={changed(pocket_gptj, tmp_path)}",
                    "resume_changed=[model]",
                    "train.steps=3",
                ]
            ],
        )
    page = (tmp_path / "run/report.html").read_text()
    assert "weights: was" in page and "failed" in page


def changed(folder: Path, root: Path) -> Path:
    import shutil

    other = Path(shutil.copytree(folder, root / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    return other
