"""Assign devices to the jobs of a sweep, so that concurrent jobs never share a GPU or a core.

Each job gets launcher options. `sweep.num_gpus|num_nodes|include|exclude|hostfile|launcher` are
DeepSpeed's options. Under `deepspeed launch/train.py -m` they are read from the launcher that
started this process: its --world_info names every slot.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from finetune.config import SweepConfig
from finetune.errors import UserError
from finetune.planning.machine import gpu_free_bytes
from finetune.process import free_port

Slot = tuple[str, int]
"""Host and GPU on it."""
ONE_NODE = "Start it once, on one node: python launch/train.py -m sweep.hostfile=HOSTFILE ..."


@dataclass(frozen=True)
class Place:
    """The devices on which one job runs."""

    options: tuple[str, ...]
    """Launcher options that choose devices."""
    cores: frozenset[int] = frozenset()
    """CPU cores it is bound to; empty: all."""
    explicit: bool = False
    """The options name GPUs, so CUDA_VISIBLE_DEVICES must not narrow them a second time."""

    def command(self) -> list[str]:
        """Return the command of this Python's launcher, with a port of its own."""
        runner = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--master_port",
            str(free_port()),
        ]
        return [*runner, *self.options]


@dataclass
class Pool:
    places: list[Place]
    """One for each job that may run at once."""
    busy: set[int] = field(default_factory=set)

    def take(self) -> int | None:
        """Reserve a free place and return its number, or None."""
        free = next((n for n in range(len(self.places)) if n not in self.busy), None)
        if free is not None:
            self.busy.add(free)
        return free

    def give_back(self, n: int) -> None:
        self.busy.discard(n)


def build_pool(cfg: SweepConfig) -> Pool:
    """Divide the devices of this sweep into `sweep.parallel` places.

    Raises:
        UserError: there are fewer devices than the concurrent jobs need, or other nodes cannot be
            reached from here.
    """
    extra, at_once = shlex.split(cfg.launcher), cfg.parallel
    options = [
        str(word)
        for name in ("num_gpus", "num_nodes", "include", "exclude", "hostfile")
        if (value := getattr(cfg, name))
        for word in (f"--{name}", value)
    ]
    hosts = None if options else launched_hosts()
    elsewhere = hosts is not None and set(hosts) != {"localhost"}
    gpus = len(gpu_free_bytes())

    # CPUs: each job has its own cores; with fewer cores than jobs, some share one.
    if not (cfg.hostfile or gpus or elsewhere):
        ranks = cfg.gpus_per_job or cfg.num_gpus
        ranks = ranks or (len(hosts["localhost"]) if hosts else torchrun_ranks())
        launcher = (*(("--num_gpus", str(ranks)) if ranks else ()), *extra)
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[n::at_once] or [cores[n % len(cores)]] for n in range(at_once)]
        return Pool([Place(launcher, frozenset(share if at_once > 1 else ())) for share in shares])

    # One job at a time on all GPUs: the launcher finds them by the options as they were typed.
    if at_once == 1 and not cfg.gpus_per_job and hosts is None:
        return Pool([Place((*options, *extra))])

    # GPUs, in equal shares.
    slots = gpu_slots(cfg, hosts, gpus)
    each = cfg.gpus_per_job or len(slots) // at_once
    if each < 1 or each * at_once > len(slots):
        raise UserError(
            f"{at_once} jobs at once on {cfg.gpus_per_job or 'at least 1'} GPU(s) each need more "
            f"than the {len(slots)} GPU(s) of this sweep",
            "sweep.parallel",
            f"Try sweep.parallel={max(1, len(slots) // (cfg.gpus_per_job or 1))}.",
        )
    hostfile = cfg.hostfile
    if hosts and elsewhere:
        # The next launcher reads the hosts of the one that started this process from a file.
        with tempfile.NamedTemporaryFile("w", prefix="sweep-hosts-", delete=False) as file:
            file.writelines(f"{host} slots={max(ids) + 1}\n" for host, ids in hosts.items())
        hostfile = file.name
    places = []
    for n in range(at_once):
        by_host: dict[str, list[str]] = {}
        for host, slot in slots[n * each : (n + 1) * each]:
            by_host.setdefault(host, []).append(str(slot))
        names = "@".join(f"{host}:{','.join(ids)}" for host, ids in by_host.items())
        where = ("--hostfile", hostfile) if hostfile else ()
        places.append(Place((*where, "--include", names, *extra), explicit=True))
    return Pool(places)


def gpu_slots(cfg: SweepConfig, hosts: dict[str, list[int]] | None, here: int) -> list[Slot]:
    """Return every GPU of the sweep, host by host.

    Args:
        hosts: those of the launcher that started this process; None: there is none.
        here: GPUs of this machine.
    """
    if hosts is None and cfg.hostfile:
        try:
            text = Path(cfg.hostfile).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot be read: {error.strerror}",
                cfg.hostfile,
                "One host a line: worker-0 slots=8.",
            ) from None
        lines = re.findall(r"^\s*([^#\s]\S*)\s+slots=(\d+)", text, re.MULTILINE)
        hosts = {host: list(range(int(slots))) for host, slots in lines}
    elif hosts is None:
        visible = [i.strip() for i in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        numbered = all(i.isdigit() for i in visible)
        hosts = {"localhost": [int(i) for i in visible] if numbered else list(range(here))}

    # Named devices, written as DeepSpeed reads them: worker-0@worker-1:0,2.
    named: dict[str, dict[str, list[int]]] = {"include": {}, "exclude": {}}
    for option, chosen in named.items():
        for part in (getattr(cfg, option) or "").split("@"):
            host, _, ids = part.partition(":")
            if host and host not in hosts:
                raise UserError(
                    f"there is no host '{host}'", f"sweep.{option}", f"Known: {', '.join(hosts)}."
                )
            if host:
                chosen[host] = [int(i) for i in ids.split(",")] if ids else hosts[host]
    hosts = named["include"] or hosts
    nodes = [
        (host, [i for i in ids if i not in named["exclude"].get(host, [])])
        for host, ids in hosts.items()
    ]
    return [
        (host, slot)
        for host, ids in nodes[: cfg.num_nodes or None]
        for slot in ids[: cfg.num_gpus or None]
    ]


def launched_hosts() -> dict[str, list[int]] | None:
    """Return hosts and slots of the DeepSpeed launcher that started this process, or None.

    Raises:
        UserError: it was started on each node by hand, so other nodes cannot be reached from here.
    """
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    start = "--world_info="
    info = next((word.removeprefix(start) for word in words if word.startswith(start)), None)
    if info is None:
        return None
    hosts = json.loads(base64.urlsafe_b64decode(info))
    if len(hosts) > 1 and "SSH_CONNECTION" not in os.environ:
        raise UserError(
            "a sweep over several nodes starts its jobs by ssh, and this one was started with "
            "--no_ssh",
            remedy=ONE_NODE,
        )
    return hosts


def torchrun_ranks() -> int | None:
    """Return the processes that torchrun started on this node, or None.

    Raises:
        UserError: it started others on other nodes.
    """
    ranks, here = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    if ranks and here and ranks != here:
        raise UserError("a sweep under torchrun runs on one node", remedy=ONE_NODE)
    return int(ranks) if ranks else None
