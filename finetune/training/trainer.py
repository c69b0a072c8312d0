"""The training loop.

One step: the ranks agree on the number of scored tokens -> for each micro-batch: loss sum,
backward, step -> log, evaluate, sample, save. Everything that varies (task, adapter, stage) was
decided before.

A step whose gradient is not finite changes nothing; too many in a row end the run at the last good
step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from finetune import process
from finetune.checkpointing import faults
from finetune.checkpointing.checkpoints import Checkpoints
from finetune.checkpointing.train_state import TrainState
from finetune.config import CheckpointConfig, TrainConfig
from finetune.data.batches import StepBatches, step_positions
from finetune.dist import World, seed_for
from finetune.errors import RunFailed, who_stopped
from finetune.planning import machine
from finetune.reporting.callbacks import Callback
from finetune.sharding.engine import Engine
from finetune.tasks.base import Batch, Task, to_device
from finetune.training.hang_watch import spike
from finetune.training.stop_signals import StopRequest

Metrics = dict[str, Any]
SHOWN = 32
"""Data positions that one message names at most."""


@dataclass
class Result:
    """Outcome of a run: the body of result.json."""

    status: str
    step: int
    loss: float | None
    eval: Metrics
    tokens: int
    seconds: float
    tokens_per_second: float
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Hooks:
    """Functions that the loop calls besides training; all are collective."""

    evaluate: Callable[[], Metrics | None] | None
    """Metrics, or None when a request to stop came first."""
    sample: Callable[[int], None] | None
    learning_rate: Callable[[int], float]
    beat: Callable[[], None]
    """Called whenever something was done: the hang watch listens."""
    flops: Callable[[float, float], tuple[float, float]] = lambda tokens, pairs: (0.0, 0.0)
    """(tokens, sum of squared document lengths) -> FLOPs of training on them, and those that activation
    checkpointing does again; not collective."""
    peak_flops: float | None = None
    """FLOP/s that one device can do at most; None: not known."""


class Trainer:
    better: tuple[str, str] | None = None
    """The metric that decides which evaluation is best, and "min" or "max"; null: the task's own."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        batches: StepBatches,
        hooks: Hooks,
        checkpoints: Checkpoints,
        callbacks: Callback,
        stop: StopRequest,
        world: World,
        *,
        train: TrainConfig,
        checkpoint: CheckpointConfig,
        better: tuple[str, str] | None,
        seed: int,
        total_steps: int,
    ):
        self.engine, self.task, self.batches, self.hooks = engine, task, batches, hooks
        self.checkpoints, self.callbacks, self.stop, self.world = (
            checkpoints,
            callbacks,
            stop,
            world,
        )
        self.train, self.checkpoint, self.seed, self.total_steps = (
            train,
            checkpoint,
            seed,
            total_steps,
        )
        self.better = better
        self.heap = process.Watch() if world.device.type == "cpu" else None
        self.saved_step = -1
        self.good = TrainState()
        self.last_eval: Metrics = {}
        self.last_loss: float | None = None
        self.trained_tokens, self.trained_seconds = 0, 0.0

    def fit(self, state: TrainState) -> Result:
        """Train from `state` to the last step, or until a stop is requested."""
        self.saved_step = self.checkpoints.newest()
        state.owes_evaluation &= self.hooks.evaluate is not None
        if state.owes_evaluation or (
            self.hooks.evaluate and self.train.eval_at_start and state.step == 0
        ):
            self._evaluate_saved(state)
        self.engine.train()
        self.good = _copy(state)
        if self._out_of_patience(state):
            return self._finish(state, "done")
        status, clock, tokens, flops = "done", time.perf_counter(), 0, np.zeros(2)
        for batches in self.batches:
            scored, step_tokens, pairs, stops, saves, broken = self._agree(batches)
            if broken:
                self.checkpoints.wait()
            if stops:
                status = "preempted"
                break
            faults.point("step")
            skipped = self.engine.skipped
            lr = self.hooks.learning_rate(state.step + 1)
            losses = [
                self._micro_step(batch, i, state.step, self.world.size / (scored or 1), lr)
                for i, batch in enumerate(batches)
            ]
            state.step += 1
            state.tokens += int(step_tokens)
            tokens += int(step_tokens)
            flops += self.hooks.flops(step_tokens, pairs)
            self.hooks.beat()
            applied = self.engine.skipped == skipped
            if applied:
                state.skipped_in_a_row = 0
            else:
                self._skipped(state, losses)
            if self._is_log_step(state.step):
                self._log(state, losses, scored, lr, tokens, flops, clock)
                clock, tokens, flops = time.perf_counter(), 0, np.zeros(2)
            if applied:
                self.good = _copy(state)
            elif self.train.max_skipped and state.skipped_in_a_row >= self.train.max_skipped:
                self._give_up(state)
            clock += self._after_step(state, bool(saves))
            if self._out_of_patience(state):
                break
        return self._finish(state, "preempted" if state.owes_evaluation else status)

    def _agree(self, batches: list[Batch]) -> list[float]:
        """Sum the step's counts over all ranks in the one exchange that a step needs.

        In order: scored tokens, real tokens, squared document lengths, requests to stop, requests
        to save, failed saves.
        """
        self._tell_saved()
        scored = sum(self.task.count(batch) for batch in batches)
        tokens = sum(batch["tokens"] for batch in batches)
        pairs = sum(
            float((np.diff(batch["cu_seqlens"]).astype(np.float64) ** 2).sum()) for batch in batches
        )
        return self.world.sum(
            [
                scored,
                tokens,
                pairs,
                bool(self.stop),
                self.stop.wants_save(),
                self.checkpoints.broken,
            ]
        )

    def _micro_step(self, batch: Batch, index: int, step: int, scale: float, lr: float) -> Tensor:
        micro = int(self.train.micro_batch)
        position = (
            step * self.train.global_batch + (index * self.world.size + self.world.rank) * micro
        )
        seed_for(self.seed, position)
        loss = self.task.loss(self.engine, to_device(batch, self.world.device))
        self.engine.backward(loss, scale)
        self.engine.step(lr)
        return loss.detach()

    def _is_log_step(self, step: int) -> bool:
        return step % max(1, self.train.log_every) == 0 or step == self.total_steps

    def _log(
        self,
        state: TrainState,
        losses: list[Tensor],
        scored: float,
        lr: float,
        tokens: int,
        flops: np.ndarray,
        clock: float,
    ) -> None:
        (total,) = self.world.sum([sum(loss.item() for loss in losses)])
        seconds = time.perf_counter() - clock
        state.seconds += seconds
        self.trained_tokens, self.trained_seconds = (
            self.trained_tokens + tokens,
            self.trained_seconds + seconds,
        )
        self.last_loss = total / (scored or 1)
        jumped = math.isfinite(self.last_loss) and spike(state.recent_losses, self.last_loss)
        if jumped:
            self.callbacks.message(f"step {state.step}: the loss jumped to {self.last_loss:.4f}")
        host = machine.host_bytes()
        if self.heap:
            self.heap.after_step(host)
        self.callbacks.train_step(
            {
                "kind": "train",
                "step": state.step,
                "loss": self.last_loss,
                "lr": lr,
                "grad_norm": self.engine.grad_norm(),
                "tokens": state.tokens,
                "tokens_per_second": tokens / max(seconds, 1e-9),
                **self._memory(host),
                "skipped_steps": state.skipped,
                **self._arithmetic(flops / max(seconds, 1e-9) / self.world.size),
                **({"spike": True} if jumped else {}),
            }
        )

    def _memory(self, host: int) -> dict[str, Any]:
        """Return the largest rank's bytes now; with several ranks, also each peak. Collective."""
        ranks = self.world.gather_numbers(
            [host, machine.gpu_bytes(), machine.peak_host_bytes(), machine.peak_gpu_bytes()]
        )
        hosts, gpus, host_peaks, gpu_peaks = (
            [int(value) for value in values] for values in zip(*ranks, strict=True)
        )
        largest = {"host_bytes": max(hosts), "gpu_bytes": max(gpus)}
        if len(ranks) == 1:
            return largest
        return (
            largest
            | {"peak_host_bytes_per_rank": host_peaks}
            | ({"peak_gpu_bytes_per_rank": gpu_peaks} if any(gpu_peaks) else {})
        )

    def _arithmetic(self, flops: np.ndarray) -> dict[str, float]:
        """Return model FLOP/s of one device and those that activation checkpointing recomputes.

        Where the device's peak is known, also the former as a share of it (MFU, arXiv:2204.02311).
        """
        model, again = flops.tolist()
        peak = self.hooks.peak_flops
        return (
            {"tflops": model / 1e12}
            | ({"recompute_tflops": again / 1e12} if again else {})
            | ({"mfu": model / peak} if peak else {})
        )

    def _skipped(self, state: TrainState, losses: list[Tensor]) -> None:
        """Count a step that changed nothing, and report its data.

        Under fp16, an overflowing gradient with a finite loss is the loss scale adapting: it does
        not count towards the steps in a row.
        """
        positions = step_positions(state.step - 1, *self.batches.layout)
        mine = [
            at
            for loss, places in zip(losses, positions, strict=True)
            if not math.isfinite(loss.item())
            for at in places
        ]
        found = self.world.gather((mine, [place for places in positions for place in places]))
        bad = sorted(at for places, _ in found for at in places)
        shown = (bad or sorted(at for _, places in found for at in places))[:SHOWN]
        state.skipped += 1
        state.skipped_in_a_row += 1 if bad or not self.engine.scales_loss else 0
        rows = [self.batches.order[at] for at in shown]
        self.callbacks.message(
            f"step {state.step}: {'the loss' if bad else 'a gradient'} is not finite; the update is skipped, "
            f"{state.skipped} so far. {'Positions' if bad else 'One of the positions'} {', '.join(map(str, shown))} "
            f"of the data order, rows {', '.join(map(str, rows))}"
        )

    def _give_up(self, state: TrainState) -> None:
        """Save the weights, still those of the last applied step, as that step; end the run.

        Raises:
            RunFailed: always.
        """
        self.batches.close()
        if self.good.step > max(0, self.saved_step):
            self.save(self.good)
        self._settle()
        kept = (
            f"The checkpoint of step {self.saved_step} holds the last good state. "
            if self.saved_step > 0
            else ""
        )
        raise RunFailed(
            f"{state.skipped_in_a_row} steps in a row had no finite gradient; train.max_skipped = "
            f"{self.train.max_skipped}",
            f"step {state.step}",
            f"{kept}Look at the data named above, or try a smaller optim.lr.",
        )

    def _after_step(self, state: TrainState, save_now: bool) -> float:
        """Save, evaluate and sample if due; return the seconds spent outside training."""
        began = time.perf_counter()
        last = state.step == self.total_steps
        due_eval = bool(self.hooks.evaluate) and (_every(state.step, self.train.eval_every) or last)
        due_sample = self.hooks.sample and _every(state.step, self.train.sample_every)
        # Save before evaluating, so that a failed evaluation does not lose these steps. The
        # checkpoint records the evaluation as pending until it is marked as done.
        if save_now or last or _every(state.step, self.checkpoint.every):
            state.owes_evaluation = due_eval
            self.save(state)
        if due_eval:
            self._evaluate_saved(state)
        if self.checkpoint.best and state.best_step == state.step:
            self.save(state)
        if due_sample:
            self.hooks.sample(state.step)  # type: ignore[misc]
            self.engine.train()
        return time.perf_counter() - began

    def _evaluate_saved(self, state: TrainState) -> None:
        """Evaluate, and update the state of this step's checkpoint if there is one already."""
        self.run_evaluation(state)
        if self.saved_step == state.step and not state.owes_evaluation:
            state.callbacks = self.world.broadcast(self.callbacks.state())
            self.checkpoints.mark_evaluated(state)

    def run_evaluation(self, state: TrainState) -> None:
        """Evaluate, record the best value and notify the callbacks.

        An evaluation interrupted by a stop request is done when the run is resumed.
        """
        self.engine.train(False)
        metrics = self.hooks.evaluate()  # type: ignore[misc]
        self.engine.train()
        state.owes_evaluation = metrics is None
        if metrics is None:
            return
        self.last_eval = metrics
        name, direction = self.better or self.task.better
        value = (
            metrics[name] if metrics[name] is not None else math.nan
        )  # a correlation of constants is not defined
        if better(value, state.best, direction):
            state.best, state.best_step, state.without_gain = value, state.step, 0
        else:
            state.without_gain += 1
        self.callbacks.evaluation({"kind": "eval", "step": state.step, **metrics})

    def _out_of_patience(self, state: TrainState) -> bool:
        patience = self.train.early_stopping
        if patience and state.without_gain >= patience:
            self.callbacks.message(
                f"stopped early: no better {(self.better or self.task.better)[0]} since step {state.best_step}"
            )
            return True
        return False

    def save(self, state: TrainState) -> None:
        if self.saved_step == state.step:
            return
        state.callbacks = self.world.broadcast(self.callbacks.state())
        self.checkpoints.save(self.engine.ds, state)
        self.saved_step = state.step
        self._tell_saved()
        self.hooks.beat()

    def _tell_saved(self) -> None:
        for step, path in self.checkpoints.finished():
            self.callbacks.checkpoint(step, path)

    def _settle(self) -> None:
        """Block until every checkpoint is on disk."""
        self.checkpoints.wait()
        self._tell_saved()

    def _finish(self, state: TrainState, status: str) -> Result:
        self.batches.close()
        if state.step > 0:
            self.save(state)
        self._settle()
        if status == "preempted":
            saved = "saved" if state.step else "there was nothing to save"
            self.callbacks.message(
                f"stopped by {who_stopped(self.stop.reason or 'another rank')} after step {state.step}; {saved}"
            )
        rate = self.trained_tokens / self.trained_seconds if self.trained_seconds else 0.0
        return Result(
            status, state.step, self.last_loss, self.last_eval, state.tokens, state.seconds, rate
        )


def better(value: float, best: float | None, direction: str) -> bool:
    """Tell whether an evaluation beats the best so far.

    NaN never beats anything, and any number beats NaN.

    Args:
        direction: "min" or "max".
    """
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return value < best if direction == "min" else value > best


def _copy(state: TrainState) -> TrainState:
    return replace(state, recent_losses=list(state.recent_losses))


def _every(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
