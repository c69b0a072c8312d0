"""Checks of the `doctor` program: the installed software and the machine.

The software checks cover Python, torch against driver and compiler, DeepSpeed's ops, and versions.
The module has to import torch, but never imports deepspeed, because that import may hang or fail.
"""

from __future__ import annotations

import ast
import ctypes.util
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import GIB, gib
from finetune.sharding.ops import built_ops, extension_folders, find_stale_locks

DISTRIBUTION = "finetune-gptj"
OPS = {"deepspeed_shm_comm": "needed on CPU", "async_io": "only for nvme offload"}
GET_COMPILER = "apt-get install g++; pip install ninja"
PORT = 29500
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
GREEN, YELLOW, RED = "green", "yellow", "red"


class Check(NamedTuple):
    name: str
    level: str
    """green: ready; yellow: works, or only some things do not; red: training fails or hangs."""
    finding: str
    remedy: str = ""
    """A command to type or a step to take; empty if none is needed."""


def green(name: str, finding: str) -> Check:
    return Check(name, GREEN, finding)


def yellow(name: str, finding: str, remedy: str = "") -> Check:
    return Check(name, YELLOW, finding, remedy)


def red(name: str, finding: str, remedy: str) -> Check:
    return Check(name, RED, finding, remedy)


# ---------------------------------------------------------------------- software


def python_version() -> Check:
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    wanted = (_metadata() or {}).get("Requires-Python", "")
    if not SpecifierSet(wanted).contains(version):
        remedy = "Make a virtual environment with Python 3.11."
        return red("python", f"{version}, {wanted} is needed", remedy)
    return green("python", f"{version} at {sys.executable}")


def torch_and_cuda() -> Check:
    from finetune.planning.machine import gpu_driver

    torch = _torch()
    if torch is None:
        return red("torch", "cannot be imported", "pip install -e .")
    driver, cuda = gpu_driver(), torch.version.cuda
    build = f"torch {torch.__version__}, built for {f'CUDA {cuda}' if cuda else 'CPU'}"

    # On the CPU: for want of a GPU, of a driver, or of a torch that can use them.
    if not torch.cuda.is_available():
        if driver and not cuda:
            return yellow(
                "torch",
                f"{build}, but there is an NVIDIA driver {driver}: training would run on the CPU",
                "pip install torch --index-url https://download.pytorch.org/whl/cu130",
            )
        if driver:
            return red(
                "torch",
                f"{build} and driver {driver} do not work together",
                f"Update the driver, or install a torch built for an older CUDA than {cuda}.",
            )
        from finetune.training.mfu import SLOW_BF16, emulates_bf16

        if emulates_bf16(torch.device("cpu")):
            return yellow(
                "torch", f"{build}; no GPU here, and {SLOW_BF16}", "Train with model.dtype=fp32."
            )
        return green("torch", f"{build}; no GPU here, training runs on the CPU")

    # On GPUs: all of them need kernels of this torch, and bf16.
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cards = Counter(f"{p.name} {gib(p.total_memory, '.0f')}" for p in properties)
    listed = ", ".join(f"{n} x {card}" for card, n in cards.items())
    text = f"{build}, driver {driver or 'unknown'}: {listed}"
    oldest = min((p.major, p.minor) for p in properties)
    built_for = [
        tuple(map(int, re.findall(r"(\d+)(\d)", arch)[0]))
        for arch in torch.cuda.get_arch_list()
        if re.search(r"\d\d", arch)
    ]
    if built_for and oldest < min(built_for):
        return red(
            "torch",
            f"{text}; this torch has no kernels for compute capability {oldest[0]}.{oldest[1]}",
            "Install a torch build that still supports this GPU.",
        )
    if oldest < (8, 0):
        return yellow(
            "torch",
            f"{text}; no bf16 before compute capability 8.0",
            "Train with model.dtype=fp16.",
        )
    return green("torch", text)


def cuda_compiler() -> Check:
    """Check the CUDA compiler: DeepSpeed compiles its ops only with torch's major version."""
    torch = _torch()
    if torch is None or not torch.version.cuda or not torch.cuda.is_available():
        return green("cuda compiler", "not needed without a GPU")
    toolkit = f"Install the CUDA toolkit {torch.version.cuda}"
    release = re.search(r"release (\d+\.\d+)", _output(["nvcc", "--version"]))
    if release is None:
        return yellow(
            "cuda compiler",
            "nvcc is missing: ops that DeepSpeed compiles for CUDA cannot be built",
            f"{toolkit} if a run asks for one.",
        )
    text = f"nvcc {release[1]}, torch CUDA {torch.version.cuda}"
    if release[1].split(".")[0] == torch.version.cuda.split(".")[0]:
        return green("cuda compiler", text)
    return yellow("cuda compiler", f"{text}: DeepSpeed will not compile its ops", f"{toolkit}.")


def compilers() -> Check:
    compiler, ninja = _compiler(), _ninja()
    missing = [name for name, path in (("a C++ compiler", compiler), ("ninja", ninja)) if not path]
    if missing:
        level = yellow if "deepspeed_shm_comm" in built_ops() else red
        return level(
            "compiler",
            f"{' and '.join(missing)} missing: DeepSpeed compiles ops at first use",
            GET_COMPILER,
        )
    return green(
        "compiler", f"{_output([compiler, '--version']).partition(chr(10))[0]}; ninja at {ninja}"
    )


def deepspeed_ops() -> list[Check]:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return [red("deepspeed", "is not installed", "pip install -e .")]

    # DeepSpeed's own record of ops that were compiled at installation, read without importing it.
    prebuilt: dict[str, bool] = {}
    with suppress(OSError, SyntaxError):
        record = Path(spec.origin).with_name("git_version_info_installed.py").read_text()
        for node in ast.parse(record).body:
            if (
                isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "installed_ops"
            ):
                prebuilt = ast.literal_eval(node.value)

    findings = [green("deepspeed", importlib.metadata.version("deepspeed"))]
    for name, why in OPS.items():
        title = f"op {name.removeprefix('deepspeed_')}"
        if prebuilt.get(name):
            finding = green(title, "installed with DeepSpeed")
        elif name in built_ops():
            finding = green(title, "compiled and cached")
        elif name == "async_io" and not ctypes.util.find_library("aio"):
            finding = green(title, f"libaio is missing ({why}: apt-get install libaio-dev)")
        elif _compiler() and _ninja():
            finding = green(title, f"compiled at first use, once, in about a minute ({why})")
        else:
            finding = yellow(title, f"not built and cannot be compiled ({why})", GET_COMPILER)
        findings.append(finding)
    return findings


def build_locks() -> Check:
    folders = ", ".join(map(str, extension_folders())) or "no folder yet"
    stale = find_stale_locks()
    if not stale:
        return green("build locks", f"none is stale ({folders})")
    names = " ".join(map(str, stale))
    needed = [lock for lock in stale if lock.parent.name in OPS]
    if needed:
        return red(
            "build locks",
            f"a killed compile left {names}: a run that needs this op would wait for ever",
            f"rm {names}",
        )
    return yellow(
        "build locks",
        f"a killed compile left {names}; runs of this project do not use these ops",
        f"rm {names}",
    )


def backends() -> Check:
    torch = _torch()
    if torch is None or not torch.distributed.is_available():
        return red("communication", "torch.distributed is missing", "pip install -e .")
    gloo, nccl = torch.distributed.is_gloo_available(), torch.distributed.is_nccl_available()
    text = f"gloo {'yes' if gloo else 'no'}, NCCL {'yes' if nccl else 'no'}"
    if not gloo or (torch.cuda.is_available() and not nccl):
        return red("communication", text, "Install an official torch build: pip install -e .")
    if nccl:
        with suppress(Exception):
            text += " " + ".".join(map(str, torch.cuda.nccl.version()))
    return green("communication", text)


def small_memory() -> Check:
    """Check that bitsandbytes, if it is installed, quantises on the device that trains."""
    if importlib.util.find_spec("bitsandbytes") is None:
        text = "bitsandbytes is not installed: model.quantize and optim.name=adamw8bit need it"
        return green("8 and 4 bits", f"{text} (pip install -e '.[quant]')")
    torch = _torch()
    device = "cuda" if torch is not None and torch.cuda.is_available() else "cpu"
    place = {"cuda": "the GPU", "cpu": "the CPU"}[device]
    text = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(64, device=device), quant_type="nf4")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "Train without model.quantize and optim.name=adamw8bit, or install a build for it."
        return yellow("8 and 4 bits", f"{text} does not work on {place}: {reason}", remedy)
    return green("8 and 4 bits", f"{text} quantises on {place}")


def tested_versions() -> Check:
    """Compare installed packages with the version ranges that this project was tested with."""
    from packaging.requirements import Requirement

    metadata = _metadata()
    if metadata is None:
        return yellow(
            "versions",
            f"{DISTRIBUTION} is not installed: its ranges are unknown",
            "pip install -e .",
        )
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    missing, outside = [], []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            outside.append(f"{requirement.name} {version} (tested {requirement.specifier})")
    if missing:
        return red("versions", f"missing: {', '.join(missing)}", "pip install -e .")
    if outside:
        return yellow(
            "versions",
            f"outside the tested ranges: {', '.join(outside)}",
            "pip install -e . --upgrade",
        )
    return green("versions", f"all {len(wanted)} packages are within the tested ranges")


def _metadata() -> Any:
    """Return the metadata of this project's installation; None if it is not installed."""
    try:
        return importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Any:
    try:
        import torch
    except Exception:
        return None
    return torch


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def _ninja() -> str | None:
    """Find `ninja` on PATH, as torch does, or beside this Python, where the wheel puts it."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def _output(command: list[str | None]) -> str:
    """Return the standard output of `command`; "" if the program is missing, fails or hangs."""
    try:
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------------- the machine

# planning.machine is imported where it is used: psutil may be what is missing.


def processors() -> Check:
    from finetune.planning.machine import cpu_limit

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores, limit = cores or 1, cpu_limit()
    if limit is not None and limit < cores:
        return yellow(
            "processors",
            f"{cores} cores, but this container may use only {limit:.1f}",
            f"Set train.threads={max(1, int(limit))} so that threads do not wait for each other.",
        )
    return green("processors", f"{cores} cores")


def memory() -> Check:
    import psutil

    from finetune.planning.machine import host_free_bytes, memory_limit

    node, limit, free = psutil.virtual_memory(), memory_limit(), host_free_bytes()
    text = f"{gib(node.available)} free of {gib(node.total)}"
    if limit is not None and limit < node.total:
        text += f", this container is limited to {gib(limit)} and has {gib(free)} left"
    if free < GIB:
        return red("memory", text, "Close other programs, or raise the container's memory limit.")
    if free < 4 * GIB:
        return yellow(
            "memory",
            f"{text}: enough for the tiny model only",
            "launch/plan.py says what a recipe needs.",
        )
    return green("memory", text)


def disk() -> list[Check]:
    from finetune.planning.machine import disk_free_bytes, existing_folder

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    larger = "at a larger disk."
    findings = []
    for name, folder, least, wanted, remedy in (
        ("disk", ".", 2 * GIB, 20 * GIB, f"Checkpoints go to run_dir: point it {larger}"),
        ("disk of caches", cache, GIB, 10 * GIB, f"Point HF_HOME and XDG_CACHE_HOME {larger}"),
        ("shared memory", "/dev/shm", GIB // 16, GIB, "Start the container with --shm-size=8g."),
    ):
        free = disk_free_bytes(folder)
        text = f"{gib(free)} free at {existing_folder(folder)}"
        level = RED if free < least else YELLOW if free < wanted else GREEN
        findings.append(Check(name, level, text, "" if level == GREEN else remedy))
    return findings


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        limit = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        return yellow(
            "open files",
            f"at most {soft}: many ranks and data shards need more",
            f"ulimit -n {limit}",
        )
    return green("open files", f"at most {'unlimited' if soft == resource.RLIM_INFINITY else soft}")


def locked_memory() -> Check:
    """Check the limit on locked memory: offload and NCCL over InfiniBand pin host memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit in (-1, resource.RLIM_INFINITY):
        return green("locked memory", "unlimited")
    if limit < 64 * GIB and Path("/dev/infiniband").exists():
        return yellow(
            "locked memory", f"at most {gib(limit)}: InfiniBand needs more", "ulimit -l unlimited"
        )
    return green("locked memory", f"at most {gib(limit)}")


def master_port() -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", PORT))
        except OSError:
            return yellow(
                "master port",
                f"{PORT} is in use, perhaps by another run",
                f"deepspeed --master_port {PORT + 1} launch/train.py ...",
            )
    return green("master port", f"{PORT} is free")


def hub_cache() -> Check:
    from finetune.planning.machine import existing_folder

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(cache) / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    existing = existing_folder(folder)
    if not os.access(existing, os.W_OK):
        return yellow(
            "hub cache", f"{existing} is not writable", "Set HF_HOME to a folder of yours."
        )
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    text = f"{models} models in {folder}"
    offline = [
        name
        for name in OFFLINE_FLAGS
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
    ]
    if offline:
        return yellow(
            "hub cache",
            f"{text}; offline by {', '.join(offline)}: hub ids work only if cached",
            f"unset {' '.join(offline)}, or give local paths",
        )
    return green("hub cache", text)
