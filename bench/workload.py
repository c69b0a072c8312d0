"""Parts that the speed benchmarks share: a GPT-J of a given size, its data, the machine, and how programs are started."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from finetune.process import free_port  # noqa: E402

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "liger-kernel",
    "datasets",
)
EOS = 50256


@dataclass(frozen=True)
class Size:
    """A GPT-J; the vocabulary is always GPT-J's 50400."""

    n_embd: int = 512
    n_layer: int = 6
    n_head: int = 8
    rotary_dim: int = 32

    @property
    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with: blocks and head, not the embedding."""
        return 12 * self.n_embd**2 * self.n_layer + 50400 * self.n_embd


def make_model(folder: Path, size: Size) -> Path:
    """A random bf16 checkpoint in Hugging Face's layout, without dropout, with GPT-J's tokenizer beside it."""
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    from finetune.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = GPTJConfig(
        n_embd=size.n_embd,
        n_layer=size.n_layer,
        n_head=size.n_head,
        rotary_dim=size.rotary_dim,
        n_positions=2048,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    GPTJForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(None).save_pretrained(folder)
    return folder


def words() -> list[str]:
    """Running text that ships with the project."""
    from finetune.assets.paths import asset
    from finetune.data.sources import read

    texts = [
        row[1]["text"] for row in read(str(asset("data") / "pile_sample/train.jsonl.zst"), "train")
    ]
    return " ".join(texts).split()


def dense_documents(file: Path, tokens: int) -> Path:
    """One long document of at least `tokens` tokens: every block that is cut from it is full."""
    text, out = words(), []
    while len(out) < tokens:  # a word is at least one token
        out += text
    file.write_text(json.dumps({"text": " ".join(out[:tokens])}) + "\n", encoding="utf-8")
    return file


def ragged_rows(file: Path, rows: int, seed: int = 0) -> Path:
    """prompt/completion rows with Alpaca's lengths: log-normal, mean about 170 tokens, none above 1000."""
    rng, text = random.Random(seed), words()
    with file.open("w", encoding="utf-8") as f:
        for _ in range(rows):
            sizes = [
                min(340, max(3, int(rng.lognormvariate(mu, sigma))))
                for mu, sigma in ((2.9, 0.7), (3.9, 1.0))
            ]
            start = rng.randrange(len(text) - sum(sizes))
            prompt, completion = (
                text[start : start + sizes[0]],
                text[start + sizes[0] : start + sum(sizes)],
            )
            f.write(
                json.dumps({"prompt": " ".join(prompt), "completion": " ".join(completion)}) + "\n"
            )
    return file


def launch(ranks: int, script: str, arguments: list[str], log: Path) -> float:
    """Run a script under the deepspeed launcher with one CPU share per rank; seconds from start to end.

    Raises:
        RuntimeError: it failed; the end of its output.
    """
    cores = len(os.sched_getaffinity(0))
    env = os.environ | {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        script,
        *arguments,
    ]
    started = time.perf_counter()
    with log.open("w") as out:
        code = subprocess.run(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started


WATCH = (
    "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL);"
    "_, status, used = os.wait4(p.pid, 0); print(used.ru_maxrss * 1024); sys.exit(bool(status))"
)


def peak_bytes(command: list[str]) -> int:
    """The most that was resident in a program, in bytes; it must end well.

    A small process starts it: what the kernel calls a child's peak begins with its parent's.
    """
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


def instructions() -> str:
    """The widest matrix instructions of this processor that the libraries may use: amx, avx512_bf16, avx512 or avx2.

    `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2` keeps them to AVX2.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        return "avx2"
    flags = set(Path("/proc/cpuinfo").read_text().split())
    for name, flag in (("amx", "amx_bf16"), ("avx512_bf16", "avx512_bf16"), ("avx512", "avx512f")):
        if flag in flags:
            return name
    return "avx2"


def fast_dtype() -> str:
    """The precision that training is quick in here: bf16 where the processor multiplies it, else fp32."""
    return "bf16" if instructions() in ("amx", "avx512_bf16") else "fp32"


def machine() -> dict:
    """Describe the machine and the software of a measurement."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "instructions": instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }
