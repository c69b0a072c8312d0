"""Shared by all tests: small GPT-J checkpoints made here, a private cache, one thread a process.

FAULT_RESULTS=FILE.json keeps what the tests that are marked `fault` found, for bench/fault_table.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # more processes than cores: threads that wait must not spin
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
ROOT = Path(__file__).resolve().parents[1]
# Ops are compiled once for this checkout: another program's builds, and locks that it left, stay out of the tests.
VERSIONS = f"py{sys.version_info.major}{sys.version_info.minor}_torch{version('torch')}"
os.environ["TORCH_EXTENSIONS_DIR"] = str(ROOT / ".pytest_cache" / "torch_extensions" / VERSIONS)

SMALL = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "n_positions": 2048,
    "vocab_size": 50400,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--export-matrix",
        choices=("part", "full"),
        default="part",
        help="full: every head, adapter, stage and number of ranks in tests/export/test_export_matrix.py",
    )
    parser.addoption(
        "--loss-grid",
        choices=("part", "full"),
        default="part",
        help="full: every stage, accumulation, layout, adapter and number of ranks in test_same_loss.py",
    )


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised data of the tests never mix with the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_CACHE"] = str(folder)
    return folder


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes that prove an export, which saves the seconds that imports take."""
    from types import SimpleNamespace

    from finetune.export import proof
    from tests.forked import run_forked

    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=run_forked))


@pytest.fixture(scope="session")
def small_gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer fp32 GPT-J with the real vocabulary, saved by transformers."""
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    folder = tmp_path_factory.mktemp("small_gptj")
    torch.manual_seed(0)
    GPTJForCausalLM(GPTJConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pocket_gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_gptj` with a vocabulary of 1024 and the tokenizer that goes with it: a step costs a tenth.

    For what does not depend on the vocabulary; losses at GPT-J's own 50400 are tested beside it.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

    folder, size, end = tmp_path_factory.mktemp("pocket_gptj"), 1024, "<|endoftext|>"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    words.train_from_iterator(
        [_shipped_text()],
        trainers.BpeTrainer(
            vocab_size=size - 24,
            special_tokens=[end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, bos_token=end).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = GPTJConfig(**SMALL | {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 0})
    GPTJForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def half_gptj(small_gptj: Path, pocket_gptj: Path) -> Path:
    """For runs in bf16: GPT-J's own vocabulary, except on a CPU that emulates bf16, two hundred times slower."""
    import torch

    from finetune.training.mfu import emulates_bf16

    return pocket_gptj if emulates_bf16(torch.device("cpu")) else small_gptj


def _shipped_text() -> str:
    from finetune.assets.paths import asset
    from finetune.data.sources import read

    rows = list(read(str(asset("data") / "pile_sample/eval.jsonl.zst"), "train"))[:12]
    return " ".join(item[1]["text"] for item in rows)


@pytest.fixture(scope="session")
def unequal_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pile-format jsonl of 60 documents between 2 and about 300 tokens, from the shipped speeches."""
    import random

    rng = random.Random(0)
    words = _shipped_text().split()
    file = tmp_path_factory.mktemp("data") / "unequal.jsonl"
    with file.open("w", encoding="utf-8") as f:
        for i in range(60):
            n = rng.choice([1, 2, 5, 20, 60, 220])
            start = rng.randrange(len(words) - n)
            row = {
                "text": " ".join(words[start : start + n]),
                "meta": {"pile_set_name": "AB"[i % 2]},
            }
            f.write(json.dumps(row) + "\n")
    return file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip where there is no GPU; files with slow tests come first, so that both workers end together."""
    import torch

    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


_faults: dict[tuple[str, str], dict[str, int]] = defaultdict(
    lambda: {"passed": 0, "failed": 0, "skipped": 0}
)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    marker = item.get_closest_marker("fault")
    if marker and (
        report.when == "call" or (report.when == "setup" and report.outcome != "passed")
    ):
        cases = getattr(item, "fault_cases", 1)
        _faults[marker.kwargs["happens"], marker.kwargs["then"]][report.outcome] += cases


@pytest.fixture
def cases(request: pytest.FixtureRequest):
    """A test that tries many things at once says how many."""

    def count(n: int) -> None:
        request.node.fault_cases = n

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = os.environ.get("FAULT_RESULTS")
    if file and _faults:
        found = [
            {"happens": happens, "then": then, **counts}
            for (happens, then), counts in _faults.items()
        ]
        before = (
            json.loads(Path(file).read_text(encoding="utf-8"))["rows"]
            if Path(file).exists()
            else []
        )
        rows = [row for row in before if (row["happens"], row["then"]) not in _faults] + found
        Path(file).write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
