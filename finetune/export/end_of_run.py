"""The export at the end of a run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.checkpointing.checkpoints import Checkpoints
from finetune.checkpointing.format import step_folder, verify
from finetune.config import Config, ExportConfig, FullConfig, Init
from finetune.dist import World
from finetune.errors import RunFailed
from finetune.export.hub import push
from finetune.export.proof import reference_outputs, reference_texts
from finetune.export.run_info import RunInfo, describe_run
from finetune.export.write import (
    finish_export,
    staged,
    write_adapter,
    write_model,
    write_random_base,
)
from finetune.gptj.adapter_init import AdapterInit, read_init
from finetune.reporting import metrics_log
from finetune.sharding.engine import Engine
from finetune.training.inputs import Inputs
from finetune.training.trainer import Result


def take_best(
    engine: Engine,
    checkpoints: Checkpoints,
    result: Result,
    best_step: int,
    run_dir: Path,
    world: World,
    say,
) -> Result:
    """Load the weights of the best evaluation into the engine, and return the result of that step. Collective.

    Where there is no such checkpoint, the last step stays, and that is said.
    """
    if best_step == result.step:
        return result
    folder = step_folder(run_dir / "checkpoints", best_step)

    def problem() -> str | None:
        if best_step == 0:
            return "no evaluation after the start was better, or all gave NaN"
        if not folder.is_dir():
            return (
                f"the best evaluation was that of step {best_step}, and this run directory has no "
                "checkpoint of it"
            )
        damage = verify(folder)
        text = f"the checkpoint of step {best_step}, which evaluated best, is damaged ({damage})"
        return text if damage else None

    if reason := world.on_main(problem):
        say(f"{reason}; the last step, {result.step}, is exported")
        return result
    say(f"exporting step {best_step}, which evaluated best")
    state = checkpoints.load(engine, folder)
    trained, metrics = world.on_main(lambda: metrics_log.newest(run_dir, best_step))
    return replace(
        result, step=best_step, loss=trained.get("loss"), eval=metrics, tokens=state.tokens
    )


def export_trained(
    cfg: Config, engine: Engine, inputs: Inputs, result: Result, run_dir: Path, world: World, say
) -> None:
    """Write adapter or model to run_dir/export, proven equal to what was trained. Collective.

    Raises:
        RunFailed: the export is empty or not equal to the trained model; nothing is left of it.
    """
    task, target = inputs.task, run_dir / "export"
    if cfg.model.init is Init.random and not isinstance(cfg.adapter, FullConfig):
        # An adapter is worth nothing without the very weights it was trained on, and nobody else
        # has these.
        base = run_dir / "base"
        world.on_main(
            lambda: write_random_base(cfg.model, task.head, cfg.seed, base, task.num_labels)
        )
    facts = {
        "training data's fingerprint": inputs.train.fingerprint,
        "steps": result.step,
        "tokens": result.tokens,
        "training loss": result.loss,
    }
    about = inputs.about()
    info = world.on_main(lambda: describe_run(cfg, run_dir, about, result.eval, facts))
    texts = reference_texts(inputs.train)
    init = read_init(cfg, run_dir)
    figures = export_engine(engine, inputs.tokenizer, info, cfg.export, texts, target, world, init)
    if "other ids" in figures.get("chat_template", ""):
        say(f"the export's apply_chat_template gives {figures['chat_template']}")
    if cfg.export.push_to_hub:
        world.on_main(lambda: say(push_or_explain(target, cfg.export)))


def export_engine(
    engine: Engine,
    tokenizer,
    info: RunInfo,
    cfg: ExportConfig,
    texts: list[list[int]],
    target: Path,
    world: World,
    init: AdapterInit | None = None,
) -> dict[str, Any]:
    """Write and verify the adapter or model that `engine` trained. Collective.

    Args:
        init: what the adapter began from, if it trained on the residual of the base.

    Returns:
        The figures of export.json.

    Raises:
        RunFailed: the export is empty or not equal to the trained model; nothing is left at
            `target`.
    """
    module, reference = engine.module, None
    if cfg.verify:
        eos = tokenizer.eos_token_id
        reference = reference_outputs(module, texts, info.head, eos, world.device)
    adapter = hasattr(module, "peft_config")
    kind = "adapter" if adapter else "full"
    remedy = f"Free some space and export again: python launch/export.py run=RUN kind={kind}"
    tensors = engine.full_parameters(trained_only=adapter)
    with ExitStack() as stack:
        # Only the main rank has a stage; the others take part in the gathering.
        stage = world.on_main(lambda: stack.enter_context(staged(target, remedy)))
        trained, error = {}, None
        if adapter:
            trained = {
                name: t.to("cpu", copy=True) for name, t in tensors if world.main or t is None
            }
        else:
            shapes = {
                name: tuple(getattr(p, "ds_shape", p.shape))
                for name, p in module.named_parameters()
            }
            folder = stage if world.main else None
            error = write_model(tensors, shapes, info.dtype, folder, cfg.max_shard_gib)
        errors = [e for e in world.gather(str(error) if error else None) if e]
        if errors:
            raise RunFailed(f"could not be written: {errors[0]}", str(target), remedy)

        def finish() -> dict[str, Any]:
            with stack:
                if adapter:
                    write_adapter(module, trained, stage, init)
                return finish_export(stage, kind, tokenizer, module.config, info, reference)

        return world.on_main(finish)


def push_or_explain(folder: Path, cfg: ExportConfig) -> str:
    """Push at the end of training, where a failure must not fail the run.

    Returns:
        The outcome, as a message for users.
    """
    assert cfg.push_to_hub
    try:
        return f"pushed to {push(folder, cfg.push_to_hub, cfg.hub_private, cfg.hub_base)}"
    except RunFailed as error:
        return f"not pushed: {error.render()}"
