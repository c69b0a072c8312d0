"""One training run, from config to exported model. Read this file first.

argv -> app.compose_train -> Config -> [here] -> exit code

The parts do not import each other; only this file knows them all, and it builds them in order.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune import dist, process
from finetune.check import best_metric, check
from finetune.checkpointing import faults
from finetune.checkpointing.checkpoints import Checkpoints
from finetune.checkpointing.format import find_resume
from finetune.checkpointing.train_state import TrainState
from finetune.compose import recipe_config
from finetune.config import Config, Dtype, Offload, plain_config
from finetune.data.batches import Order, StepBatches
from finetune.data.columns import Store
from finetune.dist import World
from finetune.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted, RunFailed
from finetune.export.end_of_run import base_name, export_trained, take_best
from finetune.export.write import reference_texts
from finetune.files import write_json
from finetune.gptj import adapters
from finetune.gptj.load import build_model, local_folder, weights_identity
from finetune.inference.sample import sample_texts
from finetune.planning import machine
from finetune.planning.choose import Plan
from finetune.reporting import metrics_log
from finetune.reporting.callbacks import CallbackList, RunInfo
from finetune.reporting.environment import environment
from finetune.reporting.metrics_log import MetricsLog
from finetune.reporting.page.build import Report, build_report
from finetune.reporting.terminal import Display, silence_libraries
from finetune.reporting.trackers import build_trackers
from finetune.sharding import deepspeed_config, nvme
from finetune.sharding.deepspeed_config import Sharding
from finetune.sharding.engine import (
    Engine,
    compiles_first,
    connect_deepspeed,
    partitioned_build,
    place_partitioned,
)
from finetune.tasks.base import Task
from finetune.training import schedule, stop_signals
from finetune.training.evaluate import Interrupted, evaluate
from finetune.training.hang_watch import HangWatch
from finetune.training.inputs import Inputs, absent, prepare_inputs
from finetune.training.mfu import SLOW_BF16, emulates_bf16, peak_flops, step_flops
from finetune.training.out_of_memory import HostWatch, Overflow
from finetune.training.rank_failures import LastWords
from finetune.training.rehearsal import probe
from finetune.training.run_dir import (
    RunLock,
    failed_result,
    final_result,
    make_run_dir,
    save_config,
    with_logged,
)
from finetune.training.schedule import Length, run_length
from finetune.training.sharding_plan import plan_run, sharding_of
from finetune.training.stop_signals import StopRequest
from finetune.training.summary import print_summary
from finetune.training.trainer import Hooks, Result, Trainer


def run(cfg: Config, words: list[str]) -> int:
    """Train as `cfg` says and return the exit code of the process; called by every rank.

    Args:
        words: the k=v words of the command line, for the page's "continue" command.
    """
    world = dist.connect(cfg.train.threads)
    result = run_in(world, cfg, words)
    dist.disconnect()
    return EXIT_PREEMPTED if result.status == "preempted" else EXIT_DONE


def run_in(world: World, cfg: Config, words: list[str] | None = None) -> Result:
    """Run one training among the ranks of `world`.

    On failure, result.json and the report page are written before the error is raised.
    """
    silence_libraries(cfg.verbose, world.rank)
    world.on_main(lambda: check(cfg, world.size, world.device.type == "cuda", absent))
    stop_signals.hold()
    run_dir = make_run_dir(cfg, world)
    watchers = CallbackList([Display(), Report(run_dir, recipe_config)] if world.main else [])
    lock = RunLock(run_dir)
    world.on_main(lambda: _take(run_dir, lock, watchers))
    stop, ends = StopRequest(run_dir, watch_files=world.main), LastWords(run_dir, world)
    memory = Overflow(cfg, words or [], world)
    try:
        stop_signals.deliver()
        with HostWatch(lambda free: _cut_off(run_dir, memory.low(free), world, ends, memory)):
            result = _run(cfg, world, run_dir, watchers, memory, stop, ends)
    except BaseException as error:
        stop.close(failed=not isinstance(error, Preempted))
        reason = ends.explain(memory.explain(error))
        if ends.speaks():
            failed = failed_result(run_dir, reason, world, memory.start_host, memory.stage)
            metrics_log.write_result(run_dir, failed)
            watchers.finish(failed)
            ends.say(reason)
        if reason is error:
            raise
        raise reason from None
    else:
        stop.close()
        return result
    finally:
        nvme.clear(nvme.run_folder(cfg.zero.nvme_path, run_dir), world)
        lock.release()


def _run(
    cfg: Config,
    world: World,
    run_dir: Path,
    callbacks: CallbackList,
    memory: Overflow,
    stop: StopRequest,
    ends: LastWords,
) -> Result:
    started = time.perf_counter()
    faults.point("run.begin")
    display = callbacks.callbacks[0] if world.main else None
    say = callbacks.message
    resume_from = world.on_main(lambda: find_resume(cfg.resume, run_dir, say))

    if compiles_first(world):
        say(
            "the first run on this machine compiles an op of DeepSpeed before it trains: one to two minutes on idle cores, "
            "more where others use them; let it finish"
        )
    memory.planned = world.on_main(
        lambda: plan_run(cfg, world, run_dir, None)
    )  # before hours of tokenising
    inputs = prepare_inputs(cfg, world, display, say)
    memory.planned = planned = world.on_main(
        lambda: plan_run(cfg, world, run_dir, inputs.task.num_labels)
    )
    sharding = sharding_of(planned, cfg, run_dir)
    cfg.train.micro_batch = planned.micro_batch
    length = run_length(cfg.train, len(inputs.rows))
    world.on_main(lambda: save_config(cfg, inputs.about(), reference_texts(inputs.train), run_dir))

    if cfg.model.dtype is Dtype.bf16 and emulates_bf16(world.device):
        say(f"{SLOW_BF16}: add model.dtype=fp32")
    if note := schedule.warmup_note(cfg.optim, length.steps):
        say(note)
    if sharding.stage == 0 and cfg.model.dtype is Dtype.bf16 and planned.accumulation > 1:
        say(
            "stage 0 adds up the gradients of micro-batches in bf16, which rounds each time; zero=stage1 adds them in fp32"
        )
    engine, parameters = _engine(cfg, inputs.task, sharding, world, display, memory)

    def watch() -> HangWatch:
        return HangWatch(
            cfg.train.hang_timeout,
            run_dir,
            world.rank,
            lambda text: _cut_off(run_dir, RunFailed(text), world, ends, memory),
        )

    if cfg.train.probe:
        with (
            memory.during("trying the longest batch, before step 1"),
            _phase(display, "trying the longest batch"),
            watch(),
        ):
            probe(
                engine,
                inputs.task,
                inputs.collate,
                inputs.rows,
                int(cfg.train.micro_batch),
                planned.accumulation,
            )
    checkpoints = _checkpoints(cfg, inputs, sharding, world, run_dir)
    state = checkpoints.restore(engine.ds, resume_from) if resume_from else TrainState()
    better = best_metric(cfg.task, cfg.train.metric)
    if state.rank_by(better[0]):
        say(
            f"the best evaluation is now that of the best {better[0]}: looked for anew from step {state.step} on"
        )
    checkpoints.require_room(engine.ds, several=cfg.checkpoint.every > 0)
    held = world.gather(engine.optimizer_bytes()["total"])
    if world.main:
        _watch(callbacks, cfg, run_dir, state, after=state.step if resume_from else -1)
        print_summary(
            cfg,
            run_dir,
            world.size,
            world.device.type,
            sharding,
            planned.reason,
            length.steps,
            length.epochs,
            parameters,
            held,
            inputs.train,
            inputs.rows,
        )

    hang = watch()
    hooks = Hooks(
        evaluate=_evaluation(cfg, engine, inputs, world, hang, stop),
        sample=_sampler(cfg, engine, inputs, callbacks),
        learning_rate=lambda step: schedule.learning_rate(cfg.optim, step, length.steps),
        beat=hang.beat,
        flops=step_flops(cfg, inputs.task.num_labels),
        peak_flops=peak_flops(world.device, cfg.model.dtype.value),
    )
    trainer = Trainer(
        engine,
        inputs.task,
        _batches(cfg, inputs, world, state, length),
        hooks,
        checkpoints,
        callbacks,
        stop,
        world,
        train=cfg.train,
        checkpoint=cfg.checkpoint,
        better=better,
        seed=cfg.seed,
        total_steps=length.steps,
    )

    callbacks.start(
        _run_info(cfg, memory.words, run_dir, state, length, parameters, world, planned, inputs)
    )
    if world.device.type == "cpu":
        process.release()  # memory freed by the probe does not belong to the run
    memory.start_host = int(world.maximum(machine.host_bytes()))
    with memory.during("training"), stop.flagged(), hang:
        result = with_logged(trainer.fit(state), run_dir)

    exported = cfg.export.enabled and result.status == "done"
    chosen = result
    if exported:
        with (
            memory.during("exporting"),
            _phase(display, "exporting, and verifying in a fresh process"),
        ):
            if cfg.checkpoint.best:
                chosen = take_best(
                    engine, checkpoints, result, state.best_step, run_dir, world, say
                )
            export_trained(cfg, engine, inputs, chosen, run_dir, world, say)
    final = final_result(
        result,
        world,
        engine.optimizer_bytes()["total"],
        {
            "start_host_bytes": memory.start_host,
            "zero_stage": sharding.stage,
            "export": "export" if exported else None,
            "export_step": chosen.step if exported else None,
            "best": state.best,
            "best_metric": better[0],
            "best_step": state.best_step or None,
            "skipped_steps": state.skipped,
            "stopped_by": (stop.reason or "another rank") if result.status == "preempted" else None,
            "wall_seconds": time.perf_counter() - started,
            "bad_rows": inputs.train.stats["bad_rows"],
            "bad_eval_rows": inputs.eval.stats["bad_rows"] if inputs.eval else 0,
            "data_notes": inputs.notes,
        },
    )
    if world.main:
        metrics_log.write_result(run_dir, final)
        callbacks.finish(final)
    return result


def _take(run_dir: Path, lock: RunLock, watchers: CallbackList) -> None:
    """Take over the run directory and remove the outcome of the run before."""
    lock.take(watchers.message)
    (run_dir / metrics_log.RESULT).unlink(missing_ok=True)


def _phase(display: Display | None, name: str) -> AbstractContextManager:
    return display.phase(name) if display else nullcontext()


def _engine(
    cfg: Config,
    task: Task,
    sharding: Sharding,
    world: World,
    display: Display | None,
    memory: Overflow,
) -> tuple[Engine, dict[str, int]]:
    """Build the DeepSpeed engine, and count all parameters and the trained ones."""
    phase = partial(_phase, display)
    connect_deepspeed(world, phase)
    if sharding.on_nvme and sharding.nvme_folder:
        nvme.prepare(sharding.nvme_folder, world, phase)
    config = deepspeed_config.build(cfg, sharding, world.size, world.device.type == "cuda")
    with memory.during("loading the model"):
        module = _module(cfg, task, config, world, display)
        parameters = adapters.count(module)
        engine = Engine(module, config, cfg.optim, world)
    if world.device.type == "cpu":
        process.keep_freed_memory()
    return engine, parameters


def _module(
    cfg: Config, task: Task, config: dict, world: World, display: Display | None
) -> torch.nn.Module:
    """Build GPT-J with its weights and adapter.

    At stage 3, rank 0 reads the weights and every rank keeps its part.
    """
    partition = partitioned_build(config, world)
    sharded = partition is not None
    with _phase(display, f"loading {cfg.model.path}"):
        model = build_model(
            cfg.model,
            task.head,
            device=world.device,
            seed=cfg.seed,
            num_labels=task.num_labels,
            partition=partition,
            place=partial(place_partitioned, world) if sharded else None,
            reads=world.main or not sharded,
        )
    model.transformer.checkpointing = cfg.train.activation_checkpointing  # type: ignore[union-attr]
    return adapters.attach(model, cfg.adapter, task.head, base_name(cfg), cfg.seed)


def _run_info(
    cfg: Config,
    words: list[str],
    run_dir: Path,
    state: TrainState,
    length: Length,
    parameters: dict[str, int],
    world: World,
    planned: Plan,
    inputs: Inputs,
) -> RunInfo:
    """Build the RunInfo that callbacks receive before the first step, and write data_stats.json."""
    statistics = inputs.statistics(cfg.task.max_length)
    if world.main:
        write_json(run_dir / "data_stats.json", statistics)
    about = environment(world.size, world.device) | {
        "overrides": words,
        "ranks_per_node": world.local_size,
    }
    return RunInfo(
        run_dir,
        cfg.name,
        length.steps,
        state.step,
        plain_config(cfg),
        parameters,
        world.size,
        state.step > 0,
        planned.to_json(),
        statistics,
        about,
    )


def _checkpoints(
    cfg: Config, inputs: Inputs, sharding: Sharding, world: World, run_dir: Path
) -> Checkpoints:
    """Open the run's checkpoints; clean up incomplete ones, or set all aside with resume=never."""
    weights = world.on_main(lambda: weights_identity(local_folder(cfg.model)))
    found = Checkpoints(
        run_dir / "checkpoints",
        cfg.checkpoint.keep,
        world,
        _identity(cfg, inputs.train, weights),
        cfg.resume_changed,
        _in_background(cfg, sharding, world),
        Path(cfg.resume).name,
        cfg.checkpoint.best,
    )
    world.on_main(found.set_aside if cfg.resume == "never" else found.clean)
    return found


def _identity(cfg: Config, store: Store, weights: str) -> dict[str, Any]:
    """Return the values that must not change when a run is resumed."""
    plain = plain_config(cfg)
    return {
        "data": store.fingerprint,
        "seed": cfg.seed,
        "global_batch": cfg.train.global_batch,
        "packing": cfg.train.packing,
        "max_length": cfg.task.max_length,
        "model": f"{cfg.model.init.value} {cfg.model.path}",
        "dtype": cfg.model.dtype.value,
        "weights": weights,
        "class_weights": str(getattr(cfg.task, "class_weights", None)),
        "adapter": plain["adapter"],
        "optim": plain["optim"],
        "dropout": [cfg.model.embd_pdrop, cfg.model.attn_pdrop, cfg.model.resid_pdrop],
    }


def _in_background(cfg: Config, sharding: Sharding, world: World) -> bool:
    """Tell whether checkpoints are written in the background.

    Optimizer states on GPUs must be copied to the host anyway, so they are written from that copy.
    """
    if cfg.checkpoint.background == "auto":
        return world.device.type == "cuda" and sharding.offload_optimizer is Offload.none
    return bool(cfg.checkpoint.background)


def _cut_off(
    run_dir: Path, error: RunFailed, world: World, ends: LastWords, memory: Overflow
) -> None:
    """Write result.json and the final message of a rank that a watch thread is about to end."""
    ends.write(error.render())
    if ends.speaks():
        metrics_log.write_result(
            run_dir, failed_result(run_dir, error, world, memory.start_host, memory.stage)
        )
        print(f"error: {error.render()}", file=sys.stderr, flush=True)
        with suppress(Exception):  # the page is best effort and must not hide the error
            build_report(run_dir, picture=False, recipe_of=recipe_config)


def _watch(
    callbacks: CallbackList, cfg: Config, run_dir: Path, state: TrainState, after: int
) -> None:
    """Add the callbacks, after dropping records beyond the checkpoint's step `after`."""
    for name in (metrics_log.METRICS, metrics_log.SAMPLES):
        metrics_log.truncate(run_dir / name, after, state.owes_evaluation)
    callbacks.callbacks[:0] = [MetricsLog(run_dir)]
    callbacks.callbacks += build_trackers(cfg.tracker)
    callbacks.restore(state.callbacks)


def _batches(
    cfg: Config, inputs: Inputs, world: World, state: TrainState, length: Length
) -> StepBatches:
    """Build this rank's batches for every remaining step."""
    return StepBatches(
        inputs.collate,
        Order(len(inputs.rows), cfg.seed, shuffle=True),
        global_batch=cfg.train.global_batch,
        micro_batch=int(cfg.train.micro_batch),
        world_size=world.size,
        rank=world.rank,
        start_step=state.step,
        end_step=length.steps,
        end_position=length.end_position,
        prefetch=cfg.train.prefetch,
    )


def _evaluation(
    cfg: Config, engine: Engine, inputs: Inputs, world: World, hang: HangWatch, stop: StopRequest
):
    """Build the trainer's evaluation function; None if there is no evaluation data.

    The function itself returns None when a stop request interrupted it.
    """
    task, store = inputs.task, inputs.eval
    if store is None:
        return None

    def go_on() -> bool:
        hang.beat()
        faults.point("eval.batch")
        return not world.sum([bool(stop)])[0]

    def run_once() -> dict[str, Any] | None:
        try:
            return evaluate(engine, task, store, world, cfg.train.eval_batch, go_on)
        except Interrupted:
            return None

    return run_once


def _sampler(cfg: Config, engine: Engine, inputs: Inputs, callbacks: CallbackList):
    if inputs.task.head != "lm" or not cfg.train.sample_every:
        return None

    def sample(step: int) -> None:
        texts = sample_texts(
            engine.module,
            inputs.tokenizer,
            cfg.train.sample_prompts,
            cfg.train.sample_tokens,
            cfg.seed + step,
            engine.world.device,
            encode=getattr(inputs.task, "prompt_ids", None),
            agree=lambda tokens: engine.world.on_main(lambda: tokens),
        )
        for prompt, text in zip(cfg.train.sample_prompts, texts, strict=True):
            callbacks.sample(step, prompt, text)

    return sample
