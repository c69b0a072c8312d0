"""The export at the end of a run."""

from __future__ import annotations

from pathlib import Path

from finetune.assets_path import resolve
from finetune.config import Config, FullConfig, Init
from finetune.dist import World
from finetune.engine import Engine
from finetune.export import ExportInfo, export_run, reference_texts, write_random_base
from finetune.hub import push_or_explain
from finetune.inputs import Inputs
from finetune.plain import plain_config
from finetune.trainer import Result


def base_name(cfg: Config) -> str:
    """How others find the base model: an absolute path, or the hub id; a random base is written beside the export."""
    if cfg.model.init is Init.random:
        return str(Path(cfg.run_dir or ".") / "base")
    path = Path(resolve(cfg.model.path)).expanduser()
    return str(path.absolute()) if path.is_dir() else cfg.model.path


def export_trained(cfg: Config, engine: Engine, inputs: Inputs, result: Result, run_dir: Path, world: World, say) -> None:
    """Adapter or model in run_dir/export, proven equal to what was trained. Collective.

    Raises:
        RunFailed: the export is empty or not equal to the trained model; nothing is left of it.
    """
    facts = {"recipe": cfg.name, "training data": cfg.data.train,
             "training data's fingerprint": inputs.train.fingerprint, "evaluation data": cfg.data.eval,
             "steps": result.step, "tokens": result.tokens, "seed": cfg.seed, "training loss": result.loss}
    if cfg.model.init is Init.random and not isinstance(cfg.adapter, FullConfig):
        # An adapter is worth nothing without the very weights it was trained on, and nobody else has these.
        task = inputs.task
        world.on_main(lambda: write_random_base(cfg.model, task.head, cfg.seed, run_dir / "base", task.num_labels))
    info = ExportInfo(cfg.name, inputs.task.head, base_name(cfg), cfg.model.dtype.value, inputs.about(),
                      plain_config(cfg)["task"], facts, result.eval)
    export_run(engine, inputs.tokenizer, info, cfg.export, reference_texts(inputs.train), run_dir / "export", world)
    if cfg.export.push_to_hub:
        world.on_main(lambda: say(push_or_explain(run_dir / "export", cfg.export)))
