"""Questions of a run to its model while it trains: samples, evaluation prompts, lm-eval's tasks.

A model in training answers through its training forward, without a cache.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from finetune.config import Config, asks_lm_eval
from finetune.dist import World
from finetune.inference.lm_eval import Tasks, ask_in_training, check_metric, load_tasks
from finetune.inference.sample import Sampling, continue_flat, finished_text


def tasks_of_run(cfg: Config, world: World) -> Tasks:
    """Load lm-eval's tasks of the section `eval`, with their data, on every rank. Collective.

    Raises:
        UserError: see `load_tasks` and `check_metric`.
    """
    tasks: Tasks = {}

    def load() -> None:
        names, folder = list(cfg.eval.lm_eval), cfg.eval.task_dir
        tasks.update(load_tasks(names, folder, seed=cfg.seed, section="eval."))
        if asks_lm_eval(cfg.eval, cfg.train.metric):
            check_metric(tasks, str(cfg.train.metric))

    world.on_main(load)  # downloads what the other ranks then read
    if not world.main:
        load()
    return tasks


class InTraining:
    """A language model in training that is asked for text. All methods are collective.

    Args:
        tasks: those of `tasks_of_run`.
        sharded: the weights are sharded, so that every rank takes part in every forward.
        encode: prompt -> ids, for prompts that go into a template; None: they are encoded as is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        cfg: Config,
        tasks: Tasks,
        world: World,
        *,
        sharded: bool,
        encode: Callable[[str], list[int]] | None,
    ):
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.tasks, self.world, self.encode = tasks, world, encode
        self.agree = world.broadcast if sharded else list

    def sample(self, seed: int) -> list[str]:
        """Return continuations of train.sample_prompts, drawn at temperature 0.9 and top_p 0.95."""
        how = Sampling(self.cfg.train.sample_tokens, top_p=0.95, seed=seed)
        encode = self.encode or (
            lambda text: self.tokenizer(text, add_special_tokens=False).input_ids
        )
        prompts = self.cfg.train.sample_prompts
        ids = [encode(prompt) or [self.tokenizer.eos_token_id] for prompt in prompts]
        device, agree = self.world.device, self.world.broadcast
        new = continue_flat(self.model, self.tokenizer, ids, how, device, agree=agree)
        return [finished_text(self.tokenizer, row, how.stop) for row in new]

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the ids that follow each prompt, the likeliest ones."""
        how = Sampling(self.cfg.eval.generate_tokens, temperature=0.0)
        device = self.world.device
        return continue_flat(self.model, self.tokenizer, prompts, how, device, agree=self.agree)

    def suite(self, after_batch: Callable[[], None]) -> dict[str, dict[str, float]]:
        """Return the figures of lm-eval's tasks."""
        return ask_in_training(
            self.model,
            self.tokenizer,
            self.tasks,
            self.cfg.eval.lm_eval_limit,
            after_batch=after_batch,
            batch=self.cfg.train.eval_batch,
            seed=self.cfg.seed,
            device=self.world.device,
            agree=self.agree,
        )
