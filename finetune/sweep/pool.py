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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.config import SweepConfig
from finetune.errors import UserError
from finetune.planning.machine import gpu_free_bytes
from finetune.process import free_port

Slot = tuple[str, int]
"""Host and GPU on it."""


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
    extra = tuple(shlex.split(cfg.launcher))
    hosts = _launched() if _chosen(cfg) == () else None
    gpus = gpu_free_bytes()
    if cfg.hostfile or gpus or (hosts and set(hosts) != {"localhost"}):
        return Pool(
            [
                replace(place, options=(*place.options, *extra))
                for place in _gpu_places(cfg, hosts, len(gpus))
            ]
        )
    ranks = (
        cfg.gpus_per_job
        or cfg.num_gpus
        or (len(hosts["localhost"]) if hosts else _torchrun_ranks())
    )
    options = ("--num_gpus", str(ranks)) if ranks else ()
    return Pool([Place((*options, *extra), cores) for cores in _core_shares(cfg.parallel)])


def _gpu_places(cfg: SweepConfig, hosts: dict[str, list[int]] | None, here: int) -> Iterator[Place]:
    if cfg.parallel == 1 and not cfg.gpus_per_job and hosts is None:
        yield Place(_chosen(cfg))
        return
    slots = _slots(cfg, hosts, here)
    each = cfg.gpus_per_job or len(slots) // cfg.parallel
    if each < 1 or each * cfg.parallel > len(slots):
        raise UserError(
            f"{cfg.parallel} jobs at once on {cfg.gpus_per_job or 'at least 1'} GPU(s) each need more than "
            f"the {len(slots)} GPU(s) of this sweep",
            "sweep.parallel",
            f"Try sweep.parallel={max(1, len(slots) // (cfg.gpus_per_job or 1))}.",
        )
    for n in range(cfg.parallel):
        yield Place(_include(slots[n * each : (n + 1) * each], cfg, hosts), explicit=True)


def _include(
    slots: list[Slot], cfg: SweepConfig, hosts: dict[str, list[int]] | None
) -> tuple[str, ...]:
    by_host: dict[str, list[int]] = {}
    for host, slot in slots:
        by_host.setdefault(host, []).append(slot)
    names = "@".join(f"{host}:{','.join(map(str, ids))}" for host, ids in by_host.items())
    hostfile = cfg.hostfile or (
        _write_hostfile(hosts) if hosts and set(hosts) != {"localhost"} else None
    )
    return (*(("--hostfile", hostfile) if hostfile else ()), "--include", names)


def _slots(cfg: SweepConfig, hosts: dict[str, list[int]] | None, here: int) -> list[Slot]:
    """Return every GPU of the sweep, host by host."""
    if hosts is None:
        hosts = _hostfile(cfg.hostfile) if cfg.hostfile else {"localhost": _visible(here)}
        chosen = _parse(cfg.include, hosts)
        dropped = _parse(cfg.exclude, hosts)
        hosts = {
            host: [
                i
                for i in (chosen.get(host, []) if chosen else ids)
                if i not in dropped.get(host, [])
            ]
            for host, ids in hosts.items()
        }
    nodes = list(hosts.items())[: cfg.num_nodes or None]
    return [(host, slot) for host, ids in nodes for slot in ids[: cfg.num_gpus or None]]


def _parse(text: str | None, hosts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Parse `worker-0@worker-1:0,2` as DeepSpeed does."""
    found: dict[str, list[int]] = {}
    for part in (text or "").split("@") if text else []:
        host, _, ids = part.partition(":")
        if host not in hosts:
            raise UserError(
                f"there is no host '{host}'", "sweep.include", f"Known: {', '.join(hosts)}."
            )
        found[host] = [int(i) for i in ids.split(",")] if ids else hosts[host]
    return found


def _hostfile(path: str) -> dict[str, list[int]]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", path, "One host a line: worker-0 slots=8."
        ) from None
    found = re.findall(
        r"^(?!#)(\S+)\s+slots=(\d+)", "\n".join(line.strip() for line in lines), re.M
    )
    return {host: list(range(int(slots))) for host, slots in found}


def _write_hostfile(hosts: dict[str, list[int]]) -> str:
    """Write the hosts of the launcher that started this process to a temporary hostfile.

    It is for the next launcher.
    """
    import tempfile

    with tempfile.NamedTemporaryFile(
        "w", prefix="sweep-hosts-", delete=False, encoding="utf-8"
    ) as file:
        file.writelines(f"{host} slots={max(ids) + 1}\n" for host, ids in hosts.items())
    return file.name


def _chosen(cfg: SweepConfig) -> tuple[str, ...]:
    """Return the options that name devices, as typed."""
    options = (
        ("--num_gpus", cfg.num_gpus),
        ("--num_nodes", cfg.num_nodes),
        ("--include", cfg.include),
        ("--exclude", cfg.exclude),
        ("--hostfile", cfg.hostfile),
    )
    return tuple(str(word) for name, value in options if value for word in (name, value))


def _launched() -> dict[str, list[int]] | None:
    """Return hosts and slots of the DeepSpeed launcher that started this process, or None.

    Raises:
        UserError: it was started on each node by hand, so other nodes cannot be reached from here.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return None
    info = next(
        (word.partition("=")[2] for word in words if word.startswith("--world_info=")), None
    )
    if info is None:
        return None
    hosts = json.loads(base64.urlsafe_b64decode(info))
    if len(hosts) > 1 and "SSH_CONNECTION" not in os.environ:
        raise UserError(
            "a sweep over several nodes starts its jobs by ssh, and this one was started with --no_ssh",
            remedy="Start it once, on one node: python launch/train.py -m sweep.hostfile=HOSTFILE ...",
        )
    return hosts


def _torchrun_ranks() -> int | None:
    ranks, here = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    if ranks and here and ranks != here:
        raise UserError(
            "a sweep under torchrun runs on one node",
            remedy="Start it once, on one node: python launch/train.py -m sweep.hostfile=HOSTFILE ...",
        )
    return int(ranks) if ranks else None


def _visible(count: int) -> list[int]:
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [name.strip() for name in names.split(",")] if names else []
    return (
        [int(name) for name in ids]
        if ids and all(name.isdigit() for name in ids)
        else list(range(count))
    )


def _core_shares(parallel: int) -> list[frozenset[int]]:
    """Return disjoint shares of the cores that this process may use.

    With fewer cores than jobs, some jobs share one.
    """
    cores = sorted(os.sched_getaffinity(0))
    if parallel == 1:
        return [frozenset()]
    return [frozenset(cores[n::parallel] or [cores[n % len(cores)]]) for n in range(parallel)]
