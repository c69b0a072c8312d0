"""The comparison of two GPU results names what got worse, and only that."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLD = {
    "micro 4": {"tokens_per_second": 1000.0, "peak_gpu_bytes": 100, "predicted_bytes": 90},
    "micro 8": {"tokens_per_second": 1200.0, "step_ms": 60.0},
}


def compare(tmp_path: Path, new_parts: dict) -> tuple[int, str]:
    files = []
    for name, parts in (("old", {"lora": {"cases": OLD}}), ("new", new_parts)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"parts": parts}))
    command = [sys.executable, "bench/gpu.py", "--compare", *map(str, files)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return ran.returncode, ran.stdout


def test_within_five_percent_and_unknown_directions_pass(tmp_path):
    cases = {
        "micro 4": {"tokens_per_second": 960.0, "peak_gpu_bytes": 104, "predicted_bytes": 900},
        "micro 8": {"tokens_per_second": 2000.0, "step_ms": 20.0},
    }
    code, text = compare(tmp_path, {"lora": {"cases": cases}})
    assert (code, text) == (0, "nothing got worse by more than 5%\n")


def test_slower_and_larger_figures_are_named(tmp_path):
    cases = {
        "micro 4": {"tokens_per_second": 900.0, "peak_gpu_bytes": 110},
        "micro 8": {"tokens_per_second": 1200.0, "step_ms": 66.0},
    }
    code, text = compare(tmp_path, {"lora": {"cases": cases}})
    assert code == 1
    assert text.splitlines() == [
        "lora: micro 4: tokens_per_second was 1,000 and is 900 (-10.0%)",
        "lora: micro 4: peak_gpu_bytes was 100 and is 110 (+10.0%)",
        "lora: micro 8: step_ms was 60 and is 66 (+10.0%)",
    ]


def test_a_case_that_fails_now_is_named_with_its_message(tmp_path):
    cases = {"micro 4": OLD["micro 4"], "micro 8": {"error": "first line\nout of memory"}}
    code, text = compare(tmp_path, {"lora": {"cases": cases}})
    assert code == 1
    assert "lora: micro 8: step_ms was 60 and is missing: out of memory" in text


def test_a_part_that_did_not_run_is_left_out(tmp_path):
    assert compare(tmp_path, {"full": {"cases": {}}})[0] == 0
