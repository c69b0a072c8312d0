"""A thin wrapper of DeepSpeed around our module, with the few operations that the loop needs.

Per micro-batch: loss = task.loss(engine, batch) ; engine.backward(loss, scale) ; engine.step(lr)

Also: building under zero.Init, placing loaded tensors into partitions, gathering them back. Files
are loaded elsewhere, and the planner chooses stage and offload, which come in through
`deepspeed_config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.config import Config, OptimConfig, PeftConfig
from finetune.dist import World
from finetune.errors import RunFailed
from finetune.gptj import adapters
from finetune.gptj.adapter_init import read_init
from finetune.gptj.adapter_start import load_start, start_folder
from finetune.gptj.adapters import parameter_groups
from finetune.gptj.load import build_model
from finetune.sharding import deepspeed_config, nvme, partitions
from finetune.sharding.deepspeed_config import Sharding
from finetune.sharding.deepspeed_patches import (
    deepspeed,
    let_the_norm_tell,
    norms_of_parts,
    read_once,
    step_at_once,
    take_norms_by_rows,
    unlink_shared_memory,
)
from finetune.sharding.ops import built_ops, find_stale_locks, hushed
from finetune.sharding.optimizers import build_optimizer

OP = "deepspeed_shm_comm"
COMPILING = "compiling DeepSpeed's CPU op, once on this machine: one to two minutes on idle cores"


def compiles_first(world: World) -> bool:
    """Tell whether the first use of DeepSpeed will compile an op: on CPUs, if not yet compiled."""
    return world.device.type == "cpu" and OP not in built_ops()


def connect_deepspeed(
    world: World,
    phase: Callable[[str], AbstractContextManager] = nullcontext,
    nvme_folder: Path | None = None,
) -> None:
    """Initialise DeepSpeed's communication and its nvme offload, which may compile ops. Collective.

    Only a stale lock of that op stops the run, which needs no other: the optimizer is torch's, and
    nvme offload checks its own op.

    Args:
        phase: context, by name, that shows the user of rank 0 that something takes long.
        nvme_folder: on the local disk of each node, for states or weights; None: there are none.

    Raises:
        RunFailed: a lock left by a killed compile would make this wait forever.
        UserError: nvme offload does not work here.
    """
    if world.device.type == "cpu":
        for lock in world.on_main(lambda: find_stale_locks(op=OP)):
            raise RunFailed(
                f"a compile of DeepSpeed's ops was killed and left its lock: {lock}",
                remedy=f"Remove it and start again: rm {lock}",
            )
    with phase(COMPILING) if world.main and compiles_first(world) else nullcontext(), hushed():
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False
        )
        world.barrier()
    unlink_shared_memory(world.rank)
    if nvme_folder:
        nvme.prepare(nvme_folder, world, phase)


def partitioned_build(config: dict, world: World) -> AbstractContextManager | None:
    """Return zero.Init at stage 3, else None.

    It partitions parameters as they are created, so that no rank ever holds the whole model.
    """
    if config["zero_optimization"]["stage"] != 3:
        return None
    # No dtype: given one, DeepSpeed 0.19 ignores it on a CPU and silently makes everything bf16.
    device = config["zero_optimization"].get("offload_param", {}).get("device")
    return deepspeed.zero.Init(config_dict_or_path=config, remote_device=device)


def place_partitioned(world: World, parameter: nn.Parameter, value: Tensor | None) -> None:
    """Write one loaded tensor of rank 0 into a partitioned parameter. Collective.

    Every rank receives its part only. DeepSpeed would gather the parameter, which takes the whole
    tensor on every rank, twice.

    Args:
        value: a host tensor of the parameter's shape and dtype; ranks other than 0 may have None.
    """
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    if part.final_location is not None:  # on nvme: DeepSpeed moves it
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if value is not None:
                parameter.data.copy_(value)
        return
    size = part.numel()  # the last rank's part may be padded
    pieces = (
        [_piece(value, rank * size, size) for rank in range(world.size)]
        if value is not None and world.main
        else None
    )
    if world.size == 1:
        assert pieces is not None
        part.copy_(pieces[0])
        return
    mine = torch.empty(size, dtype=part.dtype) if part.device.type != "cpu" else part
    torch.distributed.scatter(mine, pieces, src=0, group=world.control)
    if mine is not part:
        part.copy_(mine)


def _piece(value: Tensor, start: int, size: int) -> Tensor:
    """Return `size` elements of the flattened tensor from `start` on, zeros past its end."""
    piece = value.reshape(-1)[start : start + size]
    return (
        piece
        if piece.numel() == size
        else torch.cat([piece, piece.new_zeros(size - piece.numel())])
    )


def build_module(
    cfg: Config,
    head: str,
    num_labels: int | None,
    base_name: str,
    ds_config: dict,
    world: World,
    tokens: Sequence[int] = (),
) -> nn.Module:
    """Build GPT-J with its weights and adapter.

    At stage 3, rank 0 reads the weights and every rank keeps its part. What an adapter with
    `adapter.init` begins from is read from the run directory.

    Args:
        head: lm, classify or qa.
        base_name: how others find the base model; it is written into the adapter's config.
        ds_config: from `deepspeed_config.build`.
        tokens: ids of the task's own tokens.
    """
    partition = partitioned_build(ds_config, world)
    sharded = partition is not None
    init = read_init(cfg, Path(str(cfg.run_dir)))
    model = build_model(
        cfg.model,
        head,
        device=world.device,
        seed=cfg.seed,
        num_labels=num_labels,
        checkpointing=cfg.train.activation_checkpointing,
        neftune_alpha=cfg.train.neftune_alpha,
        partition=partition,
        place=partial(place_partitioned, world) if sharded else None,
        reads=world.main or not sharded,
        change=init.residual if init else None,
    )
    module = adapters.attach(model, cfg.adapter, head, base_name, cfg.seed, tokens)
    if init:
        init.fill(module, partial(place_partitioned, world))
    if isinstance(cfg.adapter, PeftConfig) and cfg.adapter.start:
        load_start(module, start_folder(cfg.adapter.start), partial(place_partitioned, world))
    return module


def build_engine(
    cfg: Config,
    head: str,
    num_labels: int | None,
    base_name: str,
    sharding: Sharding,
    world: World,
    tokens: Sequence[int] = (),
) -> Engine:
    """Build the model and the engine around it, as a run trains it; see `build_module`."""
    ds_config = deepspeed_config.build(cfg, sharding, world.size, world.device.type == "cuda")
    module = build_module(cfg, head, num_labels, base_name, ds_config, world, tokens)
    return Engine(module, ds_config, cfg.optim, world, getattr(cfg.adapter, "lr_ratio", 1.0))


class Engine:
    """DeepSpeed engine around one module.

    Args:
        module: the model, weights loaded, `requires_grad` set.
        config: from `deepspeed_config.build`.
        lr_ratio: learning rate of LoRA's B matrices over that of all others.
    """

    def __init__(
        self,
        module: nn.Module,
        config: dict,
        optim: OptimConfig,
        world: World,
        lr_ratio: float = 1.0,
    ):
        self.world, self.config = world, config
        self.stage: int = config["zero_optimization"]["stage"]
        groups = parameter_groups(module, optim.weight_decay, lr_ratio)
        optimizer = build_optimizer(optim, groups)
        self.max_norm: float = config["gradient_clipping"]
        self._bare = (
            self.stage == 0 and not config["bf16"]["enabled"] and not config["fp16"]["enabled"]
        )
        self._norm: float | None = None
        self._dropped = 0
        if self._bare:
            config = config | {"gradient_clipping": 0.0}
        self._ds, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module: nn.Module = self._ds.module
        self.optimizer: torch.optim.Optimizer = self._ds.basic_optimizer
        self.wrapper = self._ds.optimizer
        """DeepSpeed's optimizer around it, with the master weights; at stage 0 in fp32 the same."""
        read_once(module)
        take_norms_by_rows(self.wrapper)
        let_the_norm_tell(self.wrapper)
        step_at_once(self.wrapper)
        partitions.set_adam_step(self, 0)

    def __call__(self, **inputs) -> Tensor:
        return self._ds(**inputs)

    def train(self, mode: bool = True) -> None:
        self._ds.train(mode)

    def backward(self, loss_sum: Tensor, scale: float) -> None:
        """Accumulate gradients of `loss_sum * scale`; DeepSpeed averages them over ranks.

        With scale = ranks / (scored tokens of the step on all ranks) the step's gradient is that of
        the mean over all its scored tokens, however they are spread over micro-batches and ranks.
        """
        self._ds.backward(loss_sum * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Count one micro-batch; on the last one of the step, clip, update and zero gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        if self._bare and self._ds.is_gradient_accumulation_boundary():
            self._clip()
        self._ds.step()

    def rehearse(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Run one whole step that changes nothing, to measure the memory that a step needs.

        Gradients times 0 and a learning rate of 0 leave weights and optimizer states bitwise
        unchanged; step counters are reset. Call only before the first step and before a checkpoint
        is restored.

        Args:
            losses: one function per micro-batch, which computes its loss.
        """
        scaler = getattr(self.wrapper, "loss_scaler", None)
        scaler = scaler if hasattr(scaler, "__dict__") else None
        before = dict(vars(scaler)) if scaler is not None else {}
        losses = list(losses)
        partitions.ensure_states(
            self
        )  # before gradients, which would leave holes below them in the heap
        for i, loss in enumerate(losses):
            self._ds.set_gradient_accumulation_boundary(i + 1 == len(losses))
            self.backward(loss(), 0.0)
            self.step(0.0)
        self._ds.set_gradient_accumulation_boundary(None)  # DeepSpeed counts again
        self._ds.micro_steps = self._ds.global_steps = self._ds.global_samples = (
            self._ds.skipped_steps
        ) = 0
        self._norm, self._dropped = None, 0
        if scaler is not None:
            vars(scaler).update(before)
        partitions.set_adam_step(self, 0)

    def _clip(self) -> None:
        """Clip unpartitioned fp32 gradients; drop the update if the norm is not finite.

        Without a wrapper around the optimizer (stage 0, fp32), DeepSpeed neither reports the norm
        nor checks for non-finite values, and one such step would ruin the weights and both Adam
        moments.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self._norm = float(norms_of_parts(gradients).norm(dtype=torch.float64))
        if not math.isfinite(self._norm):
            self._ds.zero_grad()
            self._dropped += 1
        elif self._norm > self.max_norm:
            torch._foreach_mul_(gradients, self.max_norm / (self._norm + 1e-6))

    def grad_norm(self) -> float | None:
        """Return the gradient norm of the last step before clipping; nan if it was not finite."""
        norm = self._norm if self._bare else self._ds.get_global_grad_norm()
        if norm is None:
            return None
        value = float(norm)
        return value if math.isfinite(value) and value >= 0 else math.nan

    @property
    def skipped(self) -> int:
        """Number of steps that were not applied because a gradient was not finite."""
        return int(self._ds.skipped_steps) + self._dropped

    @property
    def scales_loss(self) -> bool:
        """Tell whether skipped steps also adapt the loss scale (fp16)."""
        return self.config["fp16"]["enabled"]

    @property
    def loss_scale(self) -> float | None:
        """The current loss scale of fp16; None for other dtypes."""
        scale = getattr(self.wrapper, "cur_scale", None) or getattr(
            self.wrapper, "loss_scale", None
        )
        return float(scale) if self.scales_loss and scale else None

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        # Which object holds it depends on the stage.
        for owner in (self.wrapper, getattr(self.wrapper, "loss_scaler", None)):
            if hasattr(owner, "cur_scale"):
                owner.cur_scale = value

    def optimizer_bytes(self) -> dict[str, int]:
        """Return the bytes of optimizer states on this rank; see `partitions.optimizer_bytes`."""
        partitions.ensure_states(self)
        return partitions.optimizer_bytes(self)

    def full_parameters(self, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) one at a time, gathered at stage 3.

        Collective: every rank must consume all of them.
        """
        for name, parameter in self.module.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach()
            else:
                yield name, parameter.detach()
