"""Many short runs with real ranks and real deaths, for the price of one import of torch and DeepSpeed.

    zygote (has imported everything) -> forks a launcher for each run -> forks its ranks -> launch/train.py's own code

The launcher behaves as DeepSpeed's does: a rank that ends with an error gets the others a SIGTERM and, after 30 s, a
SIGKILL; a signal to the launcher itself just ends it, and the ranks run on without it. Its command line makes ranks
take it for DeepSpeed's. Orphans come back to the zygote, so that none is missed.

Runs as a script: deepspeed_zygote.py JOBS.json RESULTS.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 30.0
LAUNCHER, HIDDEN = b"deepspeed", b"plainfork"
POLL_SECONDS = 0.02
LIMIT_SECONDS = 300.0
"""Of one run; the first on a machine compiles an op, which takes minutes where others compute too."""


def run_rank(job: dict, rank: int, port: int, log: Path) -> None:
    """A forked process becomes one rank of a run; never returns."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    size = job.get("ranks", 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CROSS_RANK": "0",
    }
    from finetune.checkpointing import faults
    from finetune.cli.train import train

    faults.arm(job.get("fault", ""))
    if job.get("nan"):
        poison(job["nan"])
    if job.get("fill"):
        fill_at(**job["fill"])
    code = 1
    try:
        code = train(job["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poison(order: dict) -> None:
    """Losses that are not a number: of `rank` in `steps` (from 1), before their gradient."""
    from finetune.training import trainer

    fit, seed_for, step = trainer.Trainer.fit, trainer.seed_for, [0]

    def poisoned_fit(self, state):
        def seed(value: int, position: int) -> None:
            step[0] = position // self.train.global_batch + 1
            seed_for(value, position)

        def loss(*args):
            bad = step[0] in order["steps"] and self.world.rank == order["rank"]
            return task_loss(*args) * math.nan if bad else task_loss(*args)

        task_loss, self.task.loss, trainer.seed_for = self.task.loss, loss, seed
        return fit(self, state)

    trainer.Trainer.fit = poisoned_fit


def fill_at(point: str, rank: int, file: str) -> None:
    """Some other program fills the disk while `rank` passes `point` of a save."""
    from finetune.checkpointing import faults

    original = faults.point

    def meet(name: str) -> None:
        if name == point and os.environ["RANK"] == str(rank):
            fill(Path(file))
        original(name)

    faults.point = meet


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as out:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while out.write(bytes(size)) == size:
                    pass


def rename(old: bytes, new: bytes) -> None:
    """Change this process's command line in /proc, in place: only launchers may look like DeepSpeed's."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc(5)
    shown = ctypes.string_at(start, end - start)
    assert len(old) == len(new) and old in shown
    ctypes.memmove(start, shown.replace(old, new), end - start)


def launcher(job: dict, log: Path, pids: Path) -> None:
    """A forked process becomes the launcher; never returns."""
    rename(HIDDEN, LAUNCHER)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    from finetune.process import free_port

    port = free_port()
    ranks = {}
    for rank in range(job.get("ranks", 2)):
        pid = os.fork()
        if pid == 0:
            run_rank(job, rank, port, log.with_suffix(f".{rank}.log"))
        ranks[pid] = rank
    pids.write_text(json.dumps({rank: pid for pid, rank in ranks.items()}))
    codes: dict[int, int] = {}
    waited = None  # seconds since the first failure, as this process lived them: a frozen machine does not count
    while len(codes) < len(ranks):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            pids.with_suffix(".codes").write_text(json.dumps(codes))
            if codes[ranks[pid]] != 0 and waited is None:
                waited = 0.0
                signal_all(ranks, codes, signal.SIGTERM)
            continue
        if waited is not None and waited > GRACE_SECONDS:
            signal_all(ranks, codes, signal.SIGKILL)
            waited = -math.inf
        time.sleep(POLL_SECONDS)
        waited = None if waited is None else waited + POLL_SECONDS
    os._exit(0)


def signal_all(ranks: dict[int, int], codes: dict[int, int], number: int) -> None:
    for pid, rank in ranks.items():
        if rank not in codes:
            os.kill(pid, number)


def steps_done(run_dir: Path) -> int:
    from finetune.reporting import metrics_log

    return max(
        (r["step"] for r in metrics_log.read(run_dir / "metrics.jsonl") if r["kind"] == "train"),
        default=0,
    )


def due(action: dict, run_dir: Path, base: int, seconds: float) -> bool:
    """After so many seconds, once a file exists, or so many steps after those that were there before.

    `then`: not before so many seconds have passed since.
    """
    if "seconds" in action:
        return seconds >= action["seconds"]
    if "exists" in action:
        return (run_dir / action["exists"]).exists()
    return steps_done(run_dir) >= base + action["steps"]


def act(action: dict, run_dir: Path, targets: dict) -> None:
    if "touch" in action:
        (run_dir / action["touch"]).touch()
        return
    for name in action["to"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(targets[name], getattr(signal, action["send"]))


def run(job: dict, folder: Path, number: int) -> dict:
    """One run to its end; every process of it is gone when this returns."""
    run_dir = Path(next(word for word in job["words"] if word.startswith("run_dir="))[8:])
    for file in job.get("remove", []):
        Path(file).unlink()
    log, pids = folder / f"{number:03d}-{job['name']}", folder / f"{number:03d}.pids"
    lived = 0.0  # seconds, as this process lived them: a machine that is frozen or busy with others does not count
    parent = os.fork()
    if parent == 0:
        launcher(job, log, pids)
    actions, sent, codes, limit = (
        list(job.get("actions", [])),
        None,
        {},
        job.get("timeout", LIMIT_SECONDS),
    )
    base = steps_done(run_dir)
    while True:
        ended = reap(codes)
        if ended:
            break
        if lived > limit:
            kill_rest(pids, parent)
            codes["timeout"] = True
            limit = math.inf
        if actions and pids.exists() and due(actions[0], run_dir, base, lived):
            action = actions.pop(0)
            if "then" in action:
                actions.insert(
                    0,
                    {"seconds": lived + action["then"], "send": action["send"], "to": action["to"]},
                )
                continue
            act(
                action,
                run_dir,
                {
                    "launcher": parent,
                    **{k: int(v) for k, v in json.loads(pids.read_text()).items()},
                },
            )
            sent = lived
        time.sleep(POLL_SECONDS)
        lived += POLL_SECONDS
    ranks = {str(pid): rank for rank, pid in json.loads(pids.read_text()).items()}
    told = (
        json.loads(pids.with_suffix(".codes").read_text())
        if pids.with_suffix(".codes").exists()
        else {}
    )
    return {
        "name": job["name"],
        "seconds": lived,
        "after_signal": lived - sent if sent is not None else None,
        "timeout": "timeout" in codes,
        "codes": told | {ranks[str(pid)]: code for pid, code in codes.items() if str(pid) in ranks},
        "output": [
            log.with_suffix(f".{rank}.log").read_text(errors="replace")
            for rank in range(job.get("ranks", 2))
        ],
        **snapshot(run_dir),
    }


def reap(codes: dict) -> bool:
    """Collect whoever ended, launcher or orphan; whether no process is left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False
        codes[pid] = os.waitstatus_to_exitcode(status)


def kill_rest(pids: Path, parent: int) -> None:
    for pid in [parent, *json.loads(pids.read_text()).values()]:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def snapshot(run_dir: Path) -> dict:
    """What the run left behind."""
    from finetune.checkpointing.format import step_folders, step_of, verify
    from finetune.reporting import metrics_log

    folder = run_dir / "checkpoints"
    found = {step_of(path): verify(path) for path in step_folders(folder)}
    result = run_dir / "result.json"
    return {
        "valid": [step for step, reason in found.items() if reason is None],
        "damaged": {step: reason for step, reason in found.items() if reason},
        "staging": sorted(p.name for p in folder.glob(".*")) if folder.is_dir() else [],
        "losses": {
            r["step"]: r["loss"]
            for r in metrics_log.read(run_dir / "metrics.jsonl")
            if r["kind"] == "train"
        },
        "bad": [
            r["step"]
            for r in metrics_log.read(run_dir / "metrics.jsonl")
            if r["kind"] == "train" and r["loss"] is None
        ],
        "stacks": {p.name: p.read_text() for p in run_dir.glob("stacks-*.txt")},
        "result": json.loads(result.read_text()) if result.exists() else None,
    }


def main(jobs_file: Path, results_file: Path) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    rename(LAUNCHER, HIDDEN)
    import tests.warm  # noqa: F401

    results = []
    for number, job in enumerate(json.loads(jobs_file.read_text())):
        results.append(run(job, results_file.parent, number))
        results_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
