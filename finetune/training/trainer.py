"""The training loop: steps, their rates, and the policy for steps that fail.

One step: the ranks agree on the number of scored tokens -> for each micro-batch: loss sum,
backward, step -> log, save, evaluate, sample. Everything that varies (task, adapter, stage) was
decided before.

A step whose gradient is not finite changes nothing; too many in a row end the run at the last good
step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from finetune import process
from finetune.checkpointing import faults
from finetune.checkpointing.checkpoints import Checkpoints
from finetune.checkpointing.train_state import TrainState
from finetune.config import (
    AdapterConfig,
    CheckpointConfig,
    FinalCheckpoint,
    OptimConfig,
    TrainConfig,
)
from finetune.data.batches import Drawn, StepBatches, step_positions
from finetune.dist import World, seed_for
from finetune.errors import EXIT_DONE, EXIT_PREEMPTED, Interrupted, RunFailed, who_stopped
from finetune.planning import machine
from finetune.planning.shape import ModelShape
from finetune.reporting.callbacks import Callback
from finetune.sharding.engine import Engine
from finetune.tasks.base import Batch, Task, to_device
from finetune.training.answers import Answers
from finetune.training.evaluate import EvalSet, Suite, evaluate
from finetune.training.hang_watch import spike
from finetune.training.mfu import peak_flops
from finetune.training.schedule import learning_rate
from finetune.training.stop_signals import StopRequest

Metrics = dict[str, Any]
SHOWN = 32
"""Data positions that one message names at most."""


@dataclass
class Result:
    """Outcome of a run: the first fields of result.json."""

    status: str
    step: int
    loss: float | None
    eval: Metrics
    tokens: int
    seconds: float
    tokens_per_second: float

    @property
    def exit_code(self) -> int:
        """Exit code of the process; 75 tells a scheduler to start the same command again."""
        return EXIT_PREEMPTED if self.status == "preempted" else EXIT_DONE


class Counts(NamedTuple):
    """Sums over all ranks that a step needs, from one exchange."""

    scored: float
    """Scored tokens, or examples: the denominator of the step's loss."""
    tokens: float
    """Real tokens, without padding."""
    squares: float
    """Sum of squared document lengths, for the FLOPs of attention."""
    stops: float
    """Ranks that were asked to stop."""
    saves: float
    """Ranks that were asked to save."""
    failed_saves: float
    """Ranks whose checkpoint in the background failed."""


class Trainer:
    """Run a task's optimizer steps.

    Args:
        eval_sets: evaluation data by name; {}: no evaluation.
        drawn: counter of what each source has given; None: there is one source.
        sample: (seed=...) -> a continuation of each of train.sample_prompts, collective; None: no
            samples.
        answers: generation of answers in evaluations; None: none.
        suite: lm-eval's tasks, and the number of evaluations from one with them to the next; None: none.
        meter: rates of the steps.
        beat: called after every step, evaluated batch and save, for the hang watch.
        best: the metric that ranks evaluations, and "min" or "max".
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        batches: StepBatches,
        eval_sets: dict[str, EvalSet],
        checkpoints: Checkpoints,
        callbacks: Callback,
        world: World,
        *,
        drawn: Drawn | None,
        sample: Callable[..., list[str]] | None,
        answers: Answers | None,
        suite: tuple[Suite, int] | None,
        meter: StepMeter,
        stop: StopRequest,
        beat: Callable[[], None],
        train: TrainConfig,
        optim: OptimConfig,
        checkpoint: CheckpointConfig,
        best: tuple[str, str],
        seed: int,
        total_steps: int,
    ):
        self.engine, self.task, self.world = engine, task, world
        self.batches, self.eval_sets, self.sample = batches, eval_sets, sample
        self.drawn, self.answers, self.suite = drawn, answers, suite
        self.checkpoints, self.callbacks = checkpoints, callbacks
        self.meter, self.stop, self.beat = meter, stop, beat
        self.train, self.optim, self.checkpoint = train, optim, checkpoint
        self.best, self.seed, self.total_steps = best, seed, total_steps
        self.bad_steps = BadSteps(train.max_skipped, batches, engine, callbacks, world)
        self.heap = process.Watch() if world.device.type == "cpu" else None
        self.saved_step = -1
        self.last_eval: Metrics = {}
        self.last_loss: float | None = None

    def fit(self, state: TrainState) -> Result:
        """Train from `state` to the last step, or until a stop is requested.

        Raises:
            RunFailed: too many steps in a row had no finite gradient, or a checkpoint cannot be
                written.
        """
        self.saved_step = self.checkpoints.newest()
        state.owes_evaluation &= bool(self.eval_sets)
        if state.owes_evaluation or (
            self.eval_sets and self.train.eval_at_start and state.step == 0
        ):
            self._evaluate(state)
        self.engine.train()
        self.bad_steps.remember(state)
        if self._out_of_patience(state):
            return self._finish(state, stopped=False)
        stopped = False
        self.meter.start()
        for batches in self.batches:
            counts = self._agree(batches)
            if counts.failed_saves:
                self.checkpoints.wait()
            if stopped := bool(counts.stops):
                break
            faults.point("step")

            # Gradients of the loss sum, divided by the scored tokens of the whole step. DeepSpeed
            # averages over ranks, hence the world size; it steps at the last micro-batch.
            lr = learning_rate(self.optim, state.step + 1, self.total_steps)
            skipped_before = self.engine.skipped
            losses: list[Tensor] = []
            figures: list[dict[str, Tensor]] = []
            self.task.prepare_step(self.engine, batches, self.world)
            for index, batch in enumerate(batches):
                seed_for(self.seed, self._position(state.step, index))
                loss = self.task.loss(self.engine, to_device(batch, self.world.device))
                self.engine.backward(loss, self.world.size / (counts.scored or 1))
                self.engine.step(lr)
                losses.append(loss.detach())
                figures.append(self.task.figures)

            state.step += 1
            state.tokens += int(counts.tokens)
            self.meter.add(counts)
            self.beat()
            applied = self.engine.skipped == skipped_before
            if not applied:
                self.bad_steps.count(state, losses)
            state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row
            if state.step % max(1, self.train.log_every) == 0 or state.step == self.total_steps:
                self._log(state, losses, figures, counts, lr)
            if applied:
                self.bad_steps.remember(state)
            elif self.bad_steps.too_many(state):
                self._give_up(state)
            with self.meter.paused():
                self._after_step(state, save_now=bool(counts.saves))
            if self._out_of_patience(state):
                break
        return self._finish(state, stopped or state.owes_evaluation)

    def _agree(self, batches: list[Batch]) -> Counts:
        """Sum the step's counts over all ranks in the one exchange that a step needs."""
        self._report_saves()
        lengths = [np.diff(batch["cu_seqlens"]).astype(np.float64) for batch in batches]
        mine = Counts(
            scored=sum(self.task.count(batch) for batch in batches),
            tokens=sum(batch["tokens"] for batch in batches),
            squares=sum(float((length**2).sum()) for length in lengths),
            stops=bool(self.stop),
            saves=self.stop.wants_save(),
            failed_saves=self.checkpoints.broken,
        )
        return Counts(*self.world.sum(list(mine)))

    def _position(self, step: int, index: int) -> int:
        """Return the data position of the first row in this rank's micro-batch `index` of a step."""
        micro_batch = int(self.train.micro_batch)
        offset = (index * self.world.size + self.world.rank) * micro_batch
        return step * self.train.global_batch + offset

    def _log(
        self,
        state: TrainState,
        losses: list[Tensor],
        figures: list[dict[str, Tensor]],
        counts: Counts,
        lr: float,
    ) -> None:
        """Write the step's record; reading its loss is the one host sync of a logged step."""
        sums = [sum(loss.item() for loss in losses)]
        sums += [sum(batch[name].item() for batch in figures) for name in figures[0]]
        total, *own = self.world.sum(sums)
        rates = self.meter.read()
        state.seconds += rates.seconds
        self.last_loss = total / (counts.scored or 1)
        with self.meter.paused():
            jumped = math.isfinite(self.last_loss) and spike(state.recent_losses, self.last_loss)
            if jumped:
                self.callbacks.message(
                    f"step {state.step}: the loss jumped to {self.last_loss:.4f}"
                )
            if self.heap:
                self.heap.after_step(machine.host_bytes())
            record = {
                "kind": "train",
                "step": state.step,
                "loss": self.last_loss,
                "lr": lr,
                "grad_norm": self.engine.grad_norm(),
                **{k: v / (counts.scored or 1) for k, v in zip(figures[0], own, strict=True)},
                "tokens": state.tokens,
                **rates.speed,
                **rates.memory,
                "skipped_steps": state.skipped,
                **rates.arithmetic,
            }
            if self.drawn:
                *_, end = self.batches.layout
                position = state.step * self.train.global_batch
                record["sources"] = self.drawn.until(min(position, end or position))
            self.callbacks.train_step(record | ({"spike": True} if jumped else {}))

    def _after_step(self, state: TrainState, save_now: bool) -> None:
        """Save, evaluate and sample if due.

        The state is saved before it is evaluated, so that a failed evaluation does not lose these
        steps. The checkpoint records the evaluation as pending until it is marked as done.
        """
        last = state.step == self.total_steps
        evaluates = bool(self.eval_sets) and (last or _every(state.step, self.train.eval_every))
        if save_now or _every(state.step, self.checkpoint.every):
            state.owes_evaluation = evaluates
            self.save(state)
        elif last:
            state.owes_evaluation = evaluates
            self._save_last(state)
        if evaluates:
            self._evaluate(state)
        if self.checkpoint.best and state.best_step == state.step:
            self.save(state)
        if self.sample and _every(state.step, self.train.sample_every):
            texts = self.sample(seed=self.seed + state.step)
            for prompt, text in zip(self.train.sample_prompts, texts, strict=True):
                self.callbacks.sample(state.step, prompt, text)
            self.engine.train()

    def _evaluate(self, state: TrainState) -> None:
        """Evaluate, rank the result, and mark this step's checkpoint, if there is one, as evaluated.

        An evaluation interrupted by a stop request is done when the run is resumed.
        """

        def go_on() -> bool:
            self.beat()
            faults.point("eval.batch")
            return not self.world.sum([bool(self.stop)])[0]

        suite, every = self.suite or (None, 1)
        # By the step alone, so that a resumed run asks at the same evaluations.
        interval, last = every * self.train.eval_every, state.step == self.total_steps
        due = last or not interval or state.step % interval == 0
        self.engine.train(False)
        try:
            metrics, answers = evaluate(
                self.engine,
                self.task,
                self.eval_sets,
                self.world,
                self.train.eval_batch,
                go_on,
                self.answers,
                suite if due else None,
            )
        except Interrupted:
            state.owes_evaluation = True
            return
        finally:
            self.engine.train()
        state.owes_evaluation = False
        self.last_eval = metrics
        name, direction = self.best
        # A correlation of constants is not defined.
        value = math.nan if metrics[name] is None else metrics[name]
        if better(value, state.best, direction):
            state.best, state.best_step, state.without_gain = value, state.step, 0
        else:
            state.without_gain += 1
        self.callbacks.evaluation({"kind": "eval", "step": state.step, **metrics})
        self.callbacks.answers(state.step, answers)
        if self.saved_step == state.step:
            state.callbacks = self.world.broadcast(self.callbacks.state())
            self.checkpoints.mark_evaluated(state)

    def _out_of_patience(self, state: TrainState) -> bool:
        patience = self.train.early_stopping
        if not patience or state.without_gain < patience:
            return False
        self.callbacks.message(
            f"stopped early: no better {self.best[0]} since step {state.best_step}"
        )
        return True

    def save(self, state: TrainState, moments: bool = True) -> None:
        """Write a checkpoint of `state`, unless its step has one. Collective."""
        if self.saved_step == state.step:
            return
        state.callbacks = self.world.broadcast(self.callbacks.state())
        self.checkpoints.save(self.engine, state, moments)
        self.saved_step = state.step
        self._report_saves()
        self.beat()

    def _save_last(self, state: TrainState) -> None:
        """Save what checkpoint.final keeps of the last step, unless it has a checkpoint."""
        if self.checkpoint.final is not FinalCheckpoint.none:
            self.save(state, moments=self.checkpoint.final is FinalCheckpoint.full)

    def _report_saves(self) -> None:
        for step, path in self.checkpoints.finished():
            self.callbacks.checkpoint(step, path)

    def _give_up(self, state: TrainState) -> None:
        """Save the weights, still those of the last applied step, as that step; end the run.

        Raises:
            RunFailed: always.
        """
        self.batches.close()
        good = self.bad_steps.good
        if good.step > max(0, self.saved_step):
            self.save(good)
        self.checkpoints.wait()
        self._report_saves()
        kept = (
            f"The checkpoint of step {self.saved_step} holds the last good state. "
            if self.saved_step > 0
            else ""
        )
        raise RunFailed(
            f"{state.skipped_in_a_row} steps in a row had no finite gradient; "
            f"train.max_skipped = {self.train.max_skipped}",
            f"step {state.step}",
            f"{kept}Look at the data named above, or try a smaller optim.lr.",
        )

    def _finish(self, state: TrainState, stopped: bool) -> Result:
        self.batches.close()
        if stopped and state.step > 0:
            self.save(state)
        elif state.step > 0:
            self._save_last(state)
        self.checkpoints.wait()
        self._report_saves()
        if stopped:
            saved = "saved" if state.step else "there was nothing to save"
            reason = who_stopped(self.stop.reason or "another rank")
            self.callbacks.message(f"stopped by {reason} after step {state.step}; {saved}")
        return Result(
            "preempted" if stopped else "done",
            state.step,
            self.last_loss,
            self.last_eval,
            state.tokens,
            state.seconds,
            self.meter.tokens_per_second,
        )


class Rates(NamedTuple):
    """Measurements of the steps since the last reading; the dicts are keys of metrics.jsonl."""

    seconds: float
    speed: dict[str, float]
    memory: dict[str, Any]
    arithmetic: dict[str, float]


class StepMeter:
    """Speed, memory and arithmetic of training steps; time spent in `paused` does not count.

    Args:
        shape: of the model, to count its FLOPs.
        dtype: bf16, fp16 or fp32.
    """

    def __init__(
        self,
        shape: ModelShape,
        adapter: AdapterConfig,
        activation_checkpointing: bool | str,
        dtype: str,
        world: World,
    ):
        self.shape, self.adapter, self.world = shape, adapter, world
        self.recomputes = activation_checkpointing in (True, "offload")
        self.peak_flops = peak_flops(world.device, dtype)
        self.all_tokens, self.all_seconds = 0.0, 0.0
        self.start()

    def start(self) -> None:
        """Begin a new interval now."""
        self.clock, self.tokens, self.model, self.again = time.perf_counter(), 0.0, 0.0, 0.0

    def add(self, counts: Counts) -> None:
        """Count one step."""
        mean_length = round(counts.squares / max(counts.tokens, 1))
        flops = self.shape.flops_per_token(mean_length, self.adapter, self.recomputes)
        self.tokens += counts.tokens
        self.model += counts.tokens * flops.model
        self.again += counts.tokens * flops.recompute

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block, such as a save or an evaluation, out of the rates."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def read(self) -> Rates:
        """Return the rates since the last reading, and begin a new interval. Collective."""
        seconds = time.perf_counter() - self.clock
        self.all_tokens += self.tokens
        self.all_seconds += seconds
        each = max(seconds, 1e-9) * self.world.size
        # Model FLOP/s of one device, those that checkpointing recomputes, and the former as a share
        # of the device's peak (MFU, arXiv:2204.02311).
        arithmetic = {"tflops": self.model / each / 1e12}
        if self.again:
            arithmetic["recompute_tflops"] = self.again / each / 1e12
        if self.peak_flops:
            arithmetic["mfu"] = self.model / each / self.peak_flops
        speed = {"tokens_per_second": self.tokens / max(seconds, 1e-9)}
        self.start()
        return Rates(seconds, speed, self._memory(), arithmetic)

    def _memory(self) -> dict[str, Any]:
        """Return the largest rank's bytes now; with several ranks, also each peak. Collective."""
        ranks = self.world.gather_numbers(
            [
                machine.host_bytes(),
                machine.gpu_bytes(),
                machine.peak_host_bytes(),
                machine.peak_gpu_bytes(),
            ]
        )
        hosts, gpus, host_peaks, gpu_peaks = (
            [int(value) for value in values] for values in zip(*ranks, strict=True)
        )
        memory: dict[str, Any] = {"host_bytes": max(hosts), "gpu_bytes": max(gpus)}
        if len(ranks) > 1:
            memory["peak_host_bytes_per_rank"] = host_peaks
        if len(ranks) > 1 and any(gpu_peaks):
            memory["peak_gpu_bytes_per_rank"] = gpu_peaks
        return memory

    @property
    def tokens_per_second(self) -> float:
        """Mean rate over all readings."""
        return self.all_tokens / self.all_seconds if self.all_seconds else 0.0


class BadSteps:
    """Policy for steps that were not applied, because a loss or gradient is not finite.

    Args:
        most: steps in a row that end the run; 0: never.
    """

    def __init__(
        self, most: int, batches: StepBatches, engine: Engine, callbacks: Callback, world: World
    ):
        self.most, self.batches, self.engine = most, batches, engine
        self.callbacks, self.world = callbacks, world
        self.good = TrainState()
        """State after the last step that was applied."""

    def remember(self, state: TrainState) -> None:
        """Keep a copy of `state` as the last good one."""
        self.good = replace(state, recent_losses=list(state.recent_losses))

    def too_many(self, state: TrainState) -> bool:
        return 0 < self.most <= state.skipped_in_a_row

    def count(self, state: TrainState, losses: list[Tensor]) -> None:
        """Count a step that changed nothing, and report the data it was computed on. Collective.

        Under fp16, an overflowing gradient with a finite loss is the loss scale adapting: it does
        not count towards the steps in a row.
        """
        positions = step_positions(state.step - 1, *self.batches.layout)
        mine = [
            position
            for loss, places in zip(losses, positions, strict=True)
            if not math.isfinite(loss.item())
            for position in places
        ]
        ranks = self.world.gather((mine, [place for places in positions for place in places]))
        bad = sorted(position for places, _ in ranks for position in places)
        shown = (bad or sorted(position for _, places in ranks for position in places))[:SHOWN]
        state.skipped += 1
        state.skipped_in_a_row += 1 if bad or not self.engine.scales_loss else 0
        rows = [self.batches.order[position] for position in shown]
        self.callbacks.message(
            f"step {state.step}: {'the loss' if bad else 'a gradient'} is not finite; the update "
            f"is skipped, {state.skipped} so far. "
            f"{'Positions' if bad else 'One of the positions'} {', '.join(map(str, shown))} "
            f"of the data order, rows {', '.join(map(str, rows))}"
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


def _every(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
