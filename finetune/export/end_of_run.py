"""The export at the end of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune.assets.paths import resolve
from finetune.checkpointing.checkpoints import Checkpoints
from finetune.checkpointing.format import step_folder, verify
from finetune.config import Config, FullConfig, Init, ModelConfig, plain_config
from finetune.dist import World
from finetune.export.hub import push_or_explain
from finetune.export.write import (
    ExportInfo,
    export_run,
    real_conversations,
    reference_texts,
    write_random_base,
)
from finetune.gptj.load import local_folder
from finetune.reporting import metrics_log
from finetune.sharding.engine import Engine
from finetune.training.inputs import Inputs
from finetune.training.trainer import Result


def base_name(cfg: ModelConfig, run_dir: Path) -> str:
    """Return how others find the base model: an absolute path, or the hub id.

    A random base is written beside the export.
    """
    if cfg.init is Init.random:
        return str(run_dir / "base")
    path = Path(resolve(cfg.path)).expanduser()
    return str(path.absolute()) if path.is_dir() else cfg.path


def take_best(
    engine: Engine,
    checkpoints: Checkpoints,
    result: Result,
    best_step: int,
    run_dir: Path,
    world: World,
    say,
) -> Result:
    """The weights of the best evaluation back into the engine; the result as it was at that step. Collective.

    Where there is no such checkpoint, the last step stays, and that is said.
    """
    if best_step == result.step:
        return result
    folder = step_folder(run_dir / "checkpoints", best_step)
    reason = world.on_main(lambda: _unusable(folder, best_step))
    if reason:
        say(f"{reason}; the last step, {result.step}, is exported")
        return result
    say(f"exporting step {best_step}, which evaluated best")
    state = checkpoints.load(engine, folder)
    trained, metrics = world.on_main(lambda: metrics_log.newest(run_dir, best_step))
    return replace(
        result, step=best_step, loss=trained.get("loss"), eval=metrics, tokens=state.tokens
    )


def _unusable(folder: Path, step: int) -> str | None:
    if step == 0:
        return "no evaluation after the start was better, or all gave NaN"
    if not folder.is_dir():
        return f"the best evaluation was that of step {step}, and this run directory has no checkpoint of it"
    damage = verify(folder)
    return (
        f"the checkpoint of step {step}, which evaluated best, is damaged ({damage})"
        if damage
        else None
    )


def export_trained(
    cfg: Config, engine: Engine, inputs: Inputs, result: Result, run_dir: Path, world: World, say
) -> None:
    """Adapter or model in run_dir/export, proven equal to what was trained. Collective.

    Raises:
        RunFailed: the export is empty or not equal to the trained model; nothing is left of it.
    """
    facts = {
        "recipe": cfg.name,
        "training data": cfg.data.train,
        "training data's fingerprint": inputs.train.fingerprint,
        "evaluation data": cfg.data.eval,
        "steps": result.step,
        "tokens": result.tokens,
        "seed": cfg.seed,
        "training loss": result.loss,
        "began from the adapter": getattr(cfg.adapter, "start", None),
    }
    if cfg.model.init is Init.random and not isinstance(cfg.adapter, FullConfig):
        # An adapter is worth nothing without the very weights it was trained on, and nobody else has these.
        task = inputs.task
        world.on_main(
            lambda: write_random_base(
                cfg.model, task.head, cfg.seed, run_dir / "base", task.num_labels
            )
        )
        base = run_dir / "base"
    else:
        base = local_folder(cfg.model, download=False)
    info = ExportInfo(
        cfg.name,
        inputs.task.head,
        base_name(cfg.model, run_dir),
        cfg.model.dtype.value,
        inputs.about(),
        plain_config(cfg)["task"],
        facts,
        result.eval,
        real_conversations(cfg.task, cfg.data) if world.main else [],
        cfg.model.revision,
        plain_config(cfg)["model"],
        base,
    )
    texts = reference_texts(inputs.train)
    figures = export_run(
        engine, inputs.tokenizer, info, cfg.export, texts, run_dir / "export", world
    )
    if "other ids" in figures.get("chat_template", ""):
        say(f"the export's apply_chat_template gives {figures['chat_template']}")
    if cfg.export.push_to_hub:
        world.on_main(lambda: say(push_or_explain(run_dir / "export", cfg.export)))
