"""One training run, from config to exported model. Read this file first.

argv -> app.compose_train -> Config -> [here] -> exit code

The parts are strangers to each other; this file alone knows them all and builds them in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import adapter, dist, ds_config, faults, memory_watch, metrics_log, schedule
from finetune.assets_path import resolve
from finetune.callbacks import CallbackList, RunInfo
from finetune.check import check
from finetune.checkpoint import Checkpoints, TrainState, find_resume
from finetune.checkpoint_files import folder_bytes, step_folders
from finetune.config import Config, FullConfig, Init, Offload
from finetune.data.batches import StepBatches
from finetune.data.columns import Store, open_store
from finetune.data.order import Order
from finetune.data.packing import Rows, efficiency
from finetune.data.store import build_store
from finetune.data.tokenizer import load_tokenizer
from finetune.display import Display, silence_libraries
from finetune.dist import World
from finetune.ds_config import Sharding
from finetune.engine import Engine, connect_deepspeed, partitioned_build, place_partitioned
from finetune.environment import environment
from finetune.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted, RunFailed
from finetune.evaluate import Interrupted, evaluate
from finetune.export import ExportInfo, export_run, reference_texts, write_random_base
from finetune.gptj.load import build_model, local_folder
from finetune.hub import push_or_explain
from finetune.last_words import LastWords
from finetune.metrics_log import MetricsLog
from finetune.peak import peak_flops
from finetune.plain import plain_config
from finetune.plan import Plan, measure_machine, plan, render_table
from finetune.report import Report
from finetune.run_files import failed_result, final_result, make_run_dir, save_config, with_logged
from finetune.run_lock import RunLock
from finetune.sample import sample_texts
from finetune.shape import load_shape
from finetune.signals import StopRequest
from finetune.summary import print_summary
from finetune.tasks import build_task
from finetune.tasks.base import Task
from finetune.trackers import build_trackers
from finetune.trainer import Hooks, Result, Trainer
from finetune.trouble import HangWatch


def run(cfg: Config, words: list[str]) -> int:
    """Train as `cfg` says; every rank calls this. Returns the process's exit code.

    Args:
        words: the k=v words of the command line, for the page's "continue" command.
    """
    world = dist.connect(cfg.train.threads)
    result = run_in(world, cfg, words)
    dist.disconnect()
    return EXIT_PREEMPTED if result.status == "preempted" else EXIT_DONE


def run_in(world: World, cfg: Config, words: list[str] | None = None) -> Result:
    """One run among the ranks of `world`. A failure leaves result.json and the page behind, then is raised."""
    silence_libraries(cfg.verbose, world.rank)
    check(cfg, world.size, world.device.type == "cuda")
    run_dir = make_run_dir(cfg, world)
    watchers = CallbackList([Display(), Report(run_dir)] if world.main else [])
    lock = RunLock(run_dir)
    world.on_main(lambda: lock.take(watchers.message))
    stop, ends = StopRequest(run_dir, watch_files=world.main), LastWords(run_dir, world)
    try:
        result = _run(cfg, world, run_dir, watchers, words or [], stop, ends)
    except BaseException as error:
        stop.close(failed=not isinstance(error, Preempted))
        reason = ends.explain(error)
        if ends.speaks():
            failed = failed_result(run_dir, reason, world)
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
        lock.release()


def _run(cfg: Config, world: World, run_dir: Path, callbacks: CallbackList, words: list[str], stop: StopRequest,
         ends: LastWords) -> Result:
    started = time.perf_counter()
    faults.point("run.begin")
    display = callbacks.callbacks[0] if world.main else None
    say = callbacks.message
    resume_from = world.on_main(lambda: find_resume(cfg.resume, run_dir, say))

    tokenizer = load_tokenizer(cfg.model.tokenizer or _tokenizer_folder(cfg))
    task = build_task(cfg.task, tokenizer, cfg.train.packing)
    train_store = _store(cfg, task, cfg.data.train, cfg.data.split, world, display)
    assert train_store is not None
    task.prepare(train_store, None)
    eval_store = _store(cfg, task, cfg.data.eval, cfg.data.eval_split, world, display)
    rows = task.rows(train_store)
    _preview(cfg, task, train_store, rows, tokenizer, say)
    notes = _notes(task, {"train": train_store, "eval": eval_store}, say)

    planned = world.on_main(lambda: _plan(cfg, world, run_dir, task))
    sharding = _sharding(planned)
    cfg.train.micro_batch = planned.micro_batch
    length = _length(cfg, len(rows))
    world.on_main(lambda: save_config(cfg, _about(task), reference_texts(train_store), run_dir))

    connect_deepspeed(world, say)
    config = ds_config.build(cfg, sharding, world.size, world.device.type == "cuda")
    module = _module(cfg, task, config, world, display)
    parameters = adapter.count(module)
    engine = Engine(module, config, cfg.optim, world)

    checkpoints = Checkpoints(run_dir / "checkpoints", cfg.checkpoint.keep, world, _identity(cfg, train_store),
                              cfg.resume_changed, _in_background(cfg, sharding, world), Path(cfg.resume).name)
    world.on_main(checkpoints.set_aside if cfg.resume == "never" else checkpoints.clean)
    state = checkpoints.restore(engine.ds, resume_from) if resume_from else TrainState()
    checkpoints.require_room(engine.ds, several=cfg.checkpoint.every > 0)
    _watch(callbacks, cfg, run_dir, state, world)
    if world.main:
        print_summary(cfg, run_dir, world.size, world.device.type, sharding, planned.reason, length.steps, length.epochs,
                      parameters, engine.optimizer_bytes()["total"], train_store, rows)

    hang = HangWatch(cfg.train.hang_timeout, run_dir, world.rank, lambda text: _hung(run_dir, text, world, ends))
    batches = StepBatches(
        lambda indices: task.collate(train_store, rows, indices), Order(len(rows), cfg.seed, shuffle=True),
        global_batch=cfg.train.global_batch, micro_batch=int(cfg.train.micro_batch), world_size=world.size,
        rank=world.rank, start_step=state.step, end_step=length.steps, end_position=length.end_position,
        prefetch=cfg.train.prefetch)
    hooks = Hooks(
        evaluate=_evaluation(cfg, engine, task, eval_store, world, hang, stop),
        sample=_sampler(cfg, engine, tokenizer, task, callbacks),
        learning_rate=lambda step: schedule.learning_rate(cfg.optim, step, length.steps), beat=hang.beat,
        flops=_flops(cfg, task), peak_flops=peak_flops(world.device, cfg.model.dtype.value))
    trainer = Trainer(engine, task, batches, hooks, checkpoints, callbacks, stop, world, train=cfg.train,
                      checkpoint=cfg.checkpoint, seed=cfg.seed, total_steps=length.steps)

    callbacks.start(_run_info(cfg, words, run_dir, state, length, parameters, world, planned, train_store, rows, eval_store,
                              notes))
    start_host = int(world.maximum(memory_watch.host_bytes()))
    with stop.flagged(), hang:
        result = with_logged(trainer.fit(state), run_dir)
    exported = _export(cfg, engine, tokenizer, task, train_store, result, run_dir, world, say)
    final = final_result(result, world, engine.optimizer_bytes()["total"], {
        "start_host_bytes": start_host, "zero_stage": sharding.stage, "export": "export" if exported else None,
        "skipped_steps": state.skipped, "wall_seconds": time.perf_counter() - started,
        "bad_rows": train_store.stats["bad_rows"], "bad_eval_rows": eval_store.stats["bad_rows"] if eval_store else 0,
        "data_notes": notes})
    if world.main:
        metrics_log.write_result(run_dir, final)
        callbacks.finish(final)
    return result


def _tokenizer_folder(cfg: Config) -> str | None:
    """The checkpoint's own tokenizer where it has one; None: GPT-J's, which ships with the project."""
    path = Path(resolve(cfg.model.path)).expanduser()
    return str(path) if path.is_dir() else None


def _store(cfg: Config, task: Task, spec: str | None, split: str, world: World, display: Display | None) -> Store | None:
    """Encoded data from the cache; built by rank 0 while the others wait."""
    if not spec:
        return None
    data = cfg.data

    def build() -> Path:
        with display.phase(f"tokenising {spec}") if display else nullcontext() as phase:
            def progress(done: float, total: float, tokens: int) -> None:
                phase.total = total
                phase.update(done)

            store = build_store(resolve(spec), split, task.encoder(), on_bad_row=data.on_bad_row.value,
                                cache_dir=Path(data.cache_dir).expanduser() if data.cache_dir else None,
                                max_bad_rows=data.max_bad_rows, progress=progress if phase else None)
        return store.path

    return open_store(world.on_main(build))


def _preview(cfg: Config, task: Task, store: Store, rows: Rows, tokenizer, say) -> None:
    if cfg.data.preview:
        from finetune.preview import preview

        say(preview(task, store, rows, tokenizer, cfg.data.preview))


def _notes(task: Task, stores: dict[str, Store | None], say) -> dict[str, list[str]]:
    """What encoding did to the data (texts cut, contexts split): said now, kept in result.json and data_stats.json."""
    found = {name: task.notes(store) if store else [] for name, store in stores.items()}
    for name, lines in found.items():
        for line in lines:
            say(f"{name} data: {line}")
    return found


def _plan(cfg: Config, world: World, run_dir: Path, task: Task) -> Plan:
    """What fits and what is chosen, written to plan.json.

    Raises:
        RunFailed: nothing fits; the table says what is missing.
    """
    shape = load_shape(str(local_folder(cfg.model)), task.head, task.num_labels or 2)
    machine = measure_machine(cfg.machine, world.size, str(run_dir))
    if cfg.machine.disk_gib is None:
        # What a resumed run already keeps there is part of what it needs.
        held = sum(folder_bytes(step) for step in step_folders(run_dir / "checkpoints"))
        machine = replace(machine, disk_bytes=machine.disk_bytes + held)
    planned = plan(cfg, machine, shape, world.size)
    metrics_log.write_json(run_dir / "plan.json", planned.to_json())
    if not planned.fits and cfg.zero.stage == "auto":
        raise RunFailed("this run does not fit this machine\n" + render_table(planned))
    return planned


def _flops(cfg: Config, task: Task) -> Callable[[float, float], float]:
    """(tokens, sum of squared document lengths) -> model FLOPs of a training step on them."""
    shape = load_shape(str(local_folder(cfg.model)), task.head, task.num_labels or 2)
    return lambda tokens, pairs: tokens * shape.flops_per_token(round(pairs / max(tokens, 1)), cfg.adapter).model


def _sharding(planned: Plan) -> Sharding:
    chosen = planned.chosen.option
    return Sharding(int(chosen.zero.removeprefix("stage")), Offload(chosen.offload_optimizer),
                    Offload(chosen.offload_params))


@dataclass
class Length:
    """How long a run is."""

    steps: int
    """Optimizer steps."""
    end_position: int | None
    """Samples in all where epochs end the run; the last step may be partial."""
    epochs: float
    """Passes over the data that this makes."""


def _length(cfg: Config, n_rows: int) -> Length:
    batch, train = cfg.train.global_batch, cfg.train
    if train.epochs is None:
        assert train.steps is not None
        return Length(train.steps, None, train.steps * batch / n_rows)
    end = max(1, round(train.epochs * n_rows))
    steps = math.ceil(end / batch)
    if train.steps is not None and train.steps < steps:
        return Length(train.steps, None, train.steps * batch / n_rows)
    return Length(steps, end, train.epochs)


def _module(cfg: Config, task: Task, config: dict, world: World, display: Display | None) -> torch.nn.Module:
    """GPT-J with its weights and adapter; at stage 3 rank 0 reads and every rank keeps its part."""
    partition = partitioned_build(config, world)
    sharded = partition is not None
    with display.phase(f"loading {cfg.model.path}") if display else nullcontext():
        model = build_model(
            cfg.model, task.head, device=world.device, seed=cfg.seed, num_labels=task.num_labels, partition=partition,
            place=place_partitioned if sharded else None, reads=world.main or not sharded)
    model.transformer.checkpointing = cfg.train.activation_checkpointing  # type: ignore[union-attr]
    return adapter.attach(model, cfg.adapter, task.head, _base_name(cfg), cfg.seed)


def _base_name(cfg: Config) -> str:
    """How others find the base model: an absolute path, or the hub id; a random base is written beside the export."""
    if cfg.model.init is Init.random:
        return str(Path(cfg.run_dir or ".") / "base")
    path = Path(resolve(cfg.model.path)).expanduser()
    return str(path.absolute()) if path.is_dir() else cfg.model.path


def _identity(cfg: Config, store: Store) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    return {"data": store.fingerprint, "seed": cfg.seed, "global_batch": cfg.train.global_batch,
            "packing": cfg.train.packing, "max_length": cfg.task.max_length,
            "model": f"{cfg.model.init.value} {cfg.model.path}", "dtype": cfg.model.dtype.value,
            "adapter": str(cfg.adapter), "optim": str(cfg.optim),
            "dropout": [cfg.model.embd_pdrop, cfg.model.attn_pdrop, cfg.model.resid_pdrop]}


def _in_background(cfg: Config, sharding: Sharding, world: World) -> bool:
    """Where the optimizer's states are on GPUs they must be copied to the host anyway: then write from that copy."""
    if cfg.checkpoint.background == "auto":
        return world.device.type == "cuda" and sharding.offload_optimizer is Offload.none
    return bool(cfg.checkpoint.background)


def _hung(run_dir: Path, text: str, world: World, ends: LastWords) -> None:
    """result.json of a run that no longer moves; the hang watch ends the process."""
    ends.write(text)
    if ends.speaks():
        metrics_log.write_result(run_dir, failed_result(run_dir, RunFailed(text), world))


def _watch(callbacks: CallbackList, cfg: Config, run_dir: Path, state: TrainState, world: World) -> None:
    """Add the listeners on rank 0, after dropping what metrics.jsonl holds beyond the checkpoint."""
    if not world.main:
        return
    for name in (metrics_log.METRICS, metrics_log.SAMPLES):
        metrics_log.truncate(run_dir / name, state.step)
    callbacks.callbacks[:0] = [MetricsLog(run_dir)]
    callbacks.callbacks += build_trackers(cfg.tracker)
    callbacks.restore(state.callbacks)


def _evaluation(cfg: Config, engine: Engine, task: Task, store: Store | None, world: World, hang: HangWatch,
                stop: StopRequest):
    """What the trainer calls to evaluate; None where there are no data. It returns None when a stop came between."""
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


def _sampler(cfg: Config, engine: Engine, tokenizer, task: Task, callbacks: CallbackList):
    if task.head != "lm" or not cfg.train.sample_every:
        return None

    def sample(step: int) -> None:
        texts = sample_texts(engine.module, tokenizer, cfg.train.sample_prompts, cfg.train.sample_tokens,
                             cfg.seed + step, engine.world.device)
        for prompt, text in zip(cfg.train.sample_prompts, texts, strict=True):
            callbacks.sample(step, prompt, text)

    return sample


def _run_info(cfg: Config, words: list[str], run_dir: Path, state: TrainState, length: Length,
              parameters: dict[str, int], world: World, planned: Plan, store: Store, rows: Rows,
              eval_store: Store | None, notes: dict[str, list[str]]) -> RunInfo:
    data = {"train": store.stats | {"rows": len(rows), "packing_efficiency": efficiency(rows, cfg.task.max_length),
                                    "notes": notes["train"]}}
    if eval_store:
        data["eval"] = eval_store.stats | {"notes": notes["eval"]}
    if world.main:
        metrics_log.write_json(run_dir / "data_stats.json", data)
    return RunInfo(run_dir, cfg.name, length.steps, state.step, plain_config(cfg), parameters, world.size,
                   state.step > 0, planned.to_json(), data,
                   environment(world.size, world.device) | {"overrides": words, "ranks_per_node": world.local_size})


def _about(task: Task) -> dict[str, Any]:
    """What the head learned from the data, for evaluation and export."""
    return task.describe() | ({"num_labels": task.num_labels} if task.num_labels else {})


def _export(cfg: Config, engine: Engine, tokenizer, task: Task, store: Store, result: Result, run_dir: Path,
            world: World, say) -> dict[str, Any] | None:
    """Adapter or model in run_dir/export, proven equal to what was trained."""
    if not cfg.export.enabled or result.status != "done":
        return None
    say("exporting and verifying in a fresh process")
    facts = {"recipe": cfg.name, "training data": cfg.data.train, "training data's fingerprint": store.fingerprint,
             "evaluation data": cfg.data.eval, "steps": result.step, "tokens": result.tokens, "seed": cfg.seed,
             "training loss": result.loss}
    if cfg.model.init is Init.random and not isinstance(cfg.adapter, FullConfig):
        # An adapter is worth nothing without the very weights it was trained on, and nobody else has these.
        world.on_main(lambda: write_random_base(cfg.model, task.head, cfg.seed, run_dir / "base", task.num_labels))
    info = ExportInfo(cfg.name, task.head, _base_name(cfg), cfg.model.dtype.value,
                      _about(task),
                      plain_config(cfg)["task"], facts, result.eval)
    figures = export_run(engine, tokenizer, info, cfg.export, reference_texts(store), run_dir / "export", world)
    if cfg.export.push_to_hub:
        world.on_main(lambda: say(push_or_explain(run_dir / "export", cfg.export)))
    return figures
