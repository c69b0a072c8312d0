"""One training run, from config to exported model. Read this file first.

argv -> cli.train -> compose -> Config -> [here] -> exit code

The parts do not import each other; only this file knows them all, and it builds them in order:
plan, inputs, engine, checkpoints, trainer, training, export, result.
"""

from __future__ import annotations

import time
from dataclasses import replace

from finetune import dist, process
from finetune.checkpointing.format import find_resume
from finetune.compose import recipe_config
from finetune.config import Config, best_metric
from finetune.data.batches import StepBatches
from finetune.export.end_of_run import export_trained, take_best
from finetune.export.proof import reference_texts
from finetune.export.run_info import base_name
from finetune.inference.in_training import InTraining, tasks_of_run
from finetune.reporting import metrics_log
from finetune.reporting.callbacks import CallbackList
from finetune.reporting.page.build import Report
from finetune.reporting.terminal import Display, silence_libraries
from finetune.reporting.trackers import build_trackers
from finetune.sharding.engine import build_engine, connect_deepspeed
from finetune.training import run_dir as run_files
from finetune.training.answers import Answers
from finetune.training.guard import Guard
from finetune.training.inputs import prepare_inputs, refuse_problems
from finetune.training.references import add_references, reference_folder
from finetune.training.rehearsal import probe
from finetune.training.schedule import run_length
from finetune.training.sharding_plan import plan_run, sharding_of
from finetune.training.summary import notes_before_training, print_summary, run_info
from finetune.training.trainer import Result, StepMeter, Trainer


def run(cfg: Config, words: list[str]) -> int:
    """Train as `cfg` says and return the exit code of the process; called by every rank.

    Args:
        words: the k=v words of the command line, for commands to paste.
    """
    world = dist.connect(cfg.train.threads, cfg.train.hang_timeout)
    result = run_in(world, cfg, words)
    dist.disconnect()
    return result.exit_code


def run_in(world: dist.World, cfg: Config, words: list[str]) -> Result:
    """Run one training among the ranks of `world`.

    On failure, result.json and the report page are written before the error is raised.
    """
    started = time.perf_counter()
    silence_libraries(cfg.verbose, world.rank)
    world.on_main(lambda: refuse_problems(cfg, world))
    run_dir = run_files.make_run_dir(cfg.run_dir, cfg.name, world)

    # Everything that observes the run, on rank 0. The metrics come first: the page reads their file.
    display = Display() if world.main else None
    report, listeners = Report(run_dir, recipe_config), CallbackList([])
    if display:
        observers = [metrics_log.MetricsLog(run_dir), display, report]
        listeners = CallbackList([*observers, *build_trackers(cfg.tracker)])
    say = listeners.message

    with Guard(cfg, words, world, run_dir, display, listeners, report.rebuild) as guard:
        resume_from = world.on_main(lambda: find_resume(cfg.resume, run_dir, say))

        # 1. Plan: ZeRO stage, offload and micro-batch that fit, before hours of tokenising.
        plan = guard.memory.plan = world.on_main(lambda: plan_run(cfg, world, run_dir))

        # lm-eval's tasks with their data, before hours of tokenising too.
        suite_tasks = {}
        if cfg.eval.lm_eval:
            with guard.phase("loading lm-eval's tasks"):
                suite_tasks = tasks_of_run(cfg, world)

        # 2. Inputs: tokenizer, task, encoded data. Only they know how many labels a classifier has.
        inputs = prepare_inputs(cfg, plan.job.shape.vocab_size, world, guard.phase, say)
        task = inputs.task
        if task.needs_reference and (folder := reference_folder(cfg)):
            task.reference = str(folder)
        if (labels := task.num_labels) and labels != plan.job.shape.num_labels:
            plan = guard.memory.plan = world.on_main(lambda: plan_run(cfg, world, run_dir, labels))
        cfg = replace(
            cfg, run_dir=str(run_dir), train=replace(cfg.train, micro_batch=plan.micro_batch)
        )
        order = inputs.order(cfg.seed)
        length = run_length(cfg.train, order.n)
        texts = reference_texts(inputs.train)
        world.on_main(lambda: run_files.save_config(cfg, inputs.about(), texts, run_dir))
        for note in notes_before_training(cfg, plan, length, world.device):
            say(note)

        # 3. Engine: the model with its adapter, sharded by DeepSpeed.
        sharding = sharding_of(plan, cfg.zero.nvme_path, run_dir)
        connect_deepspeed(world, guard.phase, sharding.nvme_folder if sharding.on_nvme else None)
        run_files.keep_adapter_init(cfg, resume_from, world, run_dir, guard.phase)
        with guard.phase(f"loading {cfg.model.path}"):
            base, tokens = base_name(cfg.model, run_dir), list(inputs.tokens.values())
            engine = build_engine(cfg, task.head, task.num_labels, base, sharding, world, tokens)
        if world.device.type == "cpu":
            process.keep_freed_memory()
        if task.reference:
            with guard.watched("computing the reference model's log-probabilities"):
                add_references(cfg, engine, inputs, world, guard.beat)
        if cfg.train.probe:
            with guard.watched("trying the longest batch"):
                probe(engine, inputs, plan.micro_batch, plan.accumulation)

        # 4. Checkpoints: continue from one, or start at step 0.
        checkpoints = run_files.open_checkpoints(cfg, inputs.identity, sharding, world, run_dir)
        state = checkpoints.restore(engine, resume_from, length.steps)
        metric, direction = best_metric(cfg.task, cfg.train.metric)
        if state.rank_by(metric):
            since = f"the best one counts from step {state.step}"
            say(f"evaluations are ranked by {metric} now; {since}")
        checkpoints.require_room(engine, cfg.checkpoint.every > 0, cfg.checkpoint.final)
        optimizer_bytes = world.gather(engine.optimizer_bytes()["total"])
        if world.main:
            last_step = state.step if resume_from else -1
            metrics_log.truncate_run(run_dir, last_step, state.owes_evaluation)
            listeners.restore(state.callbacks)
            print_summary(cfg, world, plan, length, engine, optimizer_bytes, inputs)

        # 5. Trainer: the loop, its batches and its rates.
        batches = StepBatches(
            inputs.collate,
            order,
            global_batch=cfg.train.global_batch,
            micro_batch=plan.micro_batch,
            world_size=world.size,
            rank=world.rank,
            start_step=state.step,
            end_step=length.steps,
            end_position=length.end_position,
            prefetch=cfg.train.prefetch,
        )
        meter = StepMeter(
            plan.job.shape,
            cfg.adapter,
            cfg.train.activation_checkpointing,
            cfg.model.dtype.value,
            world,
        )

        sharded = engine.stage == 3
        asked = InTraining(
            engine.module,
            inputs.tokenizer,
            cfg,
            suite_tasks,
            world,
            sharded=sharded,
            encode=getattr(task, "prompt_ids", None),
        )
        count, longest = cfg.eval.generate, cfg.eval.generate_tokens
        trainer = Trainer(
            engine,
            task,
            batches,
            inputs.eval,
            checkpoints,
            listeners,
            world,
            drawn=inputs.drawn(cfg.seed) if len(inputs.sources) > 1 else None,
            sample=asked.sample if task.head == "lm" and cfg.train.sample_every else None,
            answers=Answers(asked.generate, count, longest, sharded) if count else None,
            suite=(asked.suite, cfg.eval.lm_eval_every) if suite_tasks else None,
            meter=meter,
            stop=guard.stop,
            beat=guard.beat,
            train=cfg.train,
            optim=cfg.optim,
            checkpoint=cfg.checkpoint,
            best=(metric, direction),
            seed=cfg.seed,
            total_steps=length.steps,
        )
        listeners.start(
            run_info(cfg, words, world, plan, length, engine, inputs, start_step=state.step)
        )

        # 6. Training.
        with guard.training():
            result = run_files.with_logged(trainer.fit(state), run_dir)

        # 7. Export: the best or the last step, proven equal in a fresh process.
        exported = result if cfg.export.enabled and result.status == "done" else None
        if exported:
            with guard.phase("exporting, and verifying in a fresh process"):
                if cfg.checkpoint.best:
                    step = state.best_step
                    exported = take_best(engine, checkpoints, result, step, run_dir, world, say)
                export_trained(cfg, engine, inputs, exported, run_dir, world, say)

        # 8. Result.
        if world.main and result.status == "done":
            checkpoints.keep_at_end(cfg.checkpoint.final, [result.step, state.best_step])
        preempted = result.status == "preempted"
        facts = {
            "optimizer_bytes_per_rank": optimizer_bytes,
            "start_host_bytes": guard.start_host_bytes,
            "zero_stage": sharding.stage,
            "checkpoint": cfg.checkpoint.final.value if result.status == "done" else "full",
            "best_metric": metric,
            "stopped_by": (guard.stop.reason or "another rank") if preempted else None,
            "wall_seconds": time.perf_counter() - started,
        }
        final = run_files.final_result(result, exported, state, inputs, world, facts)
        if world.main:
            metrics_log.write_result(run_dir, final)
        listeners.finish(final)
        return result
