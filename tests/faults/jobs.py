"""Runs for the fault tests: a one-layer GPT-J, two ranks, a checkpoint every second step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 10, 2
TINY = {
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "rotary_dim": 4,
    "n_positions": 64,
    "vocab_size": 50400,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "model_type": "gptj",
    "architectures": ["GPTJForCausalLM"],
}


def words(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of a run whose model and data lie in `folder` (see `prepare`)."""
    return [
        "recipe=clm_pile",
        f"model.path={folder / 'tiny'}",
        "model.init=random",
        "model.dtype=fp32",
        f"data.train={folder / 'data.jsonl'}",
        "data.eval=null",
        f"run_dir={run_dir}",
        "task.max_length=32",
        f"train.steps={STEPS}",
        "train.global_batch=4",
        "train.micro_batch=1",
        "optim.lr=1e-2",
        "optim.warmup=0",
        "train.eval_every=0",
        "train.sample_every=0",
        "train.activation_checkpointing=false",
        "train.probe=false",
        "export.enabled=false",
        f"checkpoint.every={EVERY}",
        "checkpoint.keep=2",
        "tracker=[]",
        *more,
    ]


def prepare(folder: Path) -> Path:
    """Model config and data."""
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    (folder / "tiny/config.json").write_text(json.dumps(TINY))
    words_of_a_row = (
        "the",
        "state",
        "of",
        "a",
        "run",
        "is",
        "what",
        "it",
        "can",
        "continue",
        "from",
    )
    rows = [{"text": " ".join(f"{word} {i}" for word in words_of_a_row)} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_jobs(jobs: list[dict], folder: Path, timeout: int = 900) -> dict[str, dict]:
    """What became of each job, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = Path(__file__).with_name("deepspeed_zygote.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "results.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {result["name"]: result for result in json.loads((folder / "results.json").read_text())}
