"""A thin wrapper of DeepSpeed around our module, with the few operations that the loop needs.

Per micro-batch: loss = task.loss(engine, batch) ; engine.backward(loss, scale) ; engine.step(lr)

Also: building under zero.Init, placing loaded tensors into partitions, gathering them back. Files
are loaded elsewhere, and the planner chooses stage and offload, which come in through
`deepspeed_config`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

from finetune.config import Config, OptimConfig
from finetune.dist import World
from finetune.errors import RunFailed
from finetune.gptj import adapters
from finetune.gptj.adapters import parameter_groups
from finetune.gptj.load import build_model
from finetune.sharding import partitions
from finetune.sharding.ops import built_ops, find_stale_locks, hushed

NORM_PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Elements whose norms are taken at once, in rows of `NORM_ROW`."""
NORM_ROW = 1024
"""So few squares lose nothing in fp32; the rows' norms are added up in fp64."""
OP = "deepspeed_shm_comm"
COMPILING = "compiling DeepSpeed's CPU op, once on this machine: one to two minutes on idle cores"


def compiles_first(world: World) -> bool:
    """Tell whether the first use of DeepSpeed will compile an op: on CPUs, if not yet compiled."""
    return world.device.type == "cpu" and OP not in built_ops()


def connect_deepspeed(
    world: World, phase: Callable[[str], AbstractContextManager] = nullcontext
) -> None:
    """Initialise DeepSpeed's communication; its first use on a CPU compiles an op, in a phase.

    Only a stale lock of that op stops the run, which needs no other: the optimizer is torch's, and
    nvme offload checks its own op.

    Args:
        phase: context, by name, that shows the user of rank 0 that something takes long.

    Raises:
        RunFailed: a lock left by a killed compile would make this wait forever.
    """
    if world.device.type == "cpu":
        lock = world.on_main(_stale_lock)
        if lock:
            raise RunFailed(
                f"a compile of DeepSpeed's ops was killed and left its lock: {lock}",
                remedy=f"Remove it and start again: rm {lock}",
            )
    with phase(COMPILING) if world.main and compiles_first(world) else nullcontext(), hushed():
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False
        )
        world.barrier()
    _unlink_shared_memory(world.rank)


def _unlink_shared_memory(rank: int) -> None:
    """Unlink DeepSpeed's shared buffer: 66 MiB per rank that would stay in memory after the run.

    Every rank has mapped it by now (csrc/cpu/comm/shm.cpp), and DeepSpeed never unlinks it.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(
        missing_ok=True
    )


def _stale_lock() -> str | None:
    locks = [str(lock) for lock in find_stale_locks(op=OP)]
    return locks[0] if locks else None


def partitioned_build(config: dict, world: World) -> AbstractContextManager | None:
    """Return zero.Init at stage 3, else None.

    It partitions parameters as they are created, so that no rank ever holds the whole model.
    """
    if config["zero_optimization"]["stage"] != 3:
        return None
    # No dtype: given one, DeepSpeed 0.19 ignores it on a CPU and silently makes everything bf16.
    return deepspeed.zero.Init(config_dict_or_path=config, remote_device=_remote(config))


def _remote(config: dict) -> str | None:
    return config["zero_optimization"].get("offload_param", {}).get("device")


def place_partitioned(world: World, parameter: nn.Parameter, value: Tensor | None) -> None:
    """Write one loaded tensor of rank 0 into a partitioned parameter. Collective.

    Every rank receives its part only. DeepSpeed would gather the parameter, which takes the whole
    tensor on every rank, twice.

    Args:
        value: a host tensor of the parameter's shape and dtype; None on ranks that do not read.
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
        if value is not None
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
) -> nn.Module:
    """Build GPT-J with its weights and adapter.

    At stage 3, rank 0 reads the weights and every rank keeps its part.

    Args:
        head: lm, classify or qa.
        base_name: how others find the base model; it is written into the adapter's config.
        ds_config: from `deepspeed_config.build`.
    """
    partition = partitioned_build(ds_config, world)
    sharded = partition is not None
    model = build_model(
        cfg.model,
        head,
        device=world.device,
        seed=cfg.seed,
        num_labels=num_labels,
        checkpointing=cfg.train.activation_checkpointing,
        partition=partition,
        place=partial(place_partitioned, world) if sharded else None,
        reads=world.main or not sharded,
    )
    return adapters.attach(model, cfg.adapter, head, base_name, cfg.seed)


class Engine:
    """DeepSpeed engine around one module.

    Args:
        module: the model, weights loaded, `requires_grad` set.
        config: from `deepspeed_config.build`.
    """

    def __init__(self, module: nn.Module, config: dict, optim: OptimConfig, world: World):
        self.world, self.config = world, config
        self.stage: int = config["zero_optimization"]["stage"]
        groups = parameter_groups(module, optim.weight_decay)
        # lr is 0 until the first step: some wrappers take a step on zero gradients while they are
        # built, and with a nonzero learning rate that step would already decay the weights.
        optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=tuple(optim.betas), eps=optim.eps, fused=True
        )  # type: ignore[arg-type]
        self.max_norm: float = config["gradient_clipping"]
        self._bare = (
            self.stage == 0 and not config["bf16"]["enabled"] and not config["fp16"]["enabled"]
        )
        self._norm: float | None = None
        self._dropped = 0
        if self._bare:
            config = config | {"gradient_clipping": 0.0}
        with _without_compiler():
            self.ds, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        _read_once(module)
        partitions.set_adam_step(self.ds, 0)
        _take_norms_by_rows(self.ds.optimizer)

    @property
    def module(self) -> nn.Module:
        return self.ds.module

    def __call__(self, **inputs) -> Tensor:
        return self.ds(**inputs)

    def train(self, mode: bool = True) -> None:
        self.ds.train(mode)

    def backward(self, loss_sum: Tensor, scale: float) -> None:
        """Accumulate gradients of `loss_sum * scale`; DeepSpeed averages them over ranks.

        With scale = ranks / (scored tokens of the step on all ranks) the step's gradient is that of
        the mean over all its scored tokens, however they are spread over micro-batches and ranks.
        """
        self.ds.backward(loss_sum * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Count one micro-batch; on the last one of the step, clip, update and zero gradients."""
        for group in self.ds.basic_optimizer.param_groups:
            group["lr"] = lr
        if self._bare and self.ds.is_gradient_accumulation_boundary():
            self._clip()
        self.ds.step()

    def rehearse(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Run one whole step that changes nothing, to measure the memory that a step needs.

        Gradients times 0 and a learning rate of 0 leave weights and optimizer states bitwise
        unchanged; step counters are reset. Call only before the first step and before a checkpoint
        is restored.

        Args:
            losses: one function per micro-batch, which computes its loss.
        """
        scaler = getattr(self.ds.optimizer, "loss_scaler", None)
        scaler = scaler if hasattr(scaler, "__dict__") else None
        before = dict(vars(scaler)) if scaler is not None else {}
        losses = list(losses)
        partitions.ensure_states(
            self.ds
        )  # before gradients, which would leave holes below them in the heap
        for i, loss in enumerate(losses):
            self.ds.set_gradient_accumulation_boundary(i + 1 == len(losses))
            self.backward(loss(), 0.0)
            self.step(0.0)
        self.ds.set_gradient_accumulation_boundary(None)  # DeepSpeed counts again
        self.ds.micro_steps = self.ds.global_steps = self.ds.global_samples = (
            self.ds.skipped_steps
        ) = 0
        self._norm, self._dropped = None, 0
        if scaler is not None:
            vars(scaler).update(before)
        partitions.set_adam_step(self.ds, 0)

    def _clip(self) -> None:
        """Clip unpartitioned fp32 gradients; drop the update if the norm is not finite.

        Without a wrapper around the optimizer (stage 0, fp32), DeepSpeed neither reports the norm
        nor checks for non-finite values, and one such step would ruin the weights and both Adam
        moments.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        self._norm = float(norm)
        if not math.isfinite(self._norm):
            self.ds.zero_grad()
            self._dropped += 1
        elif self._norm > self.max_norm:
            torch._foreach_mul_(gradients, self.max_norm / (self._norm + 1e-6))

    def grad_norm(self) -> float | None:
        """Return the gradient norm of the last step before clipping; nan if it was not finite."""
        norm = self._norm if self._bare else self.ds.get_global_grad_norm()
        if norm is None:
            return None
        value = float(norm)
        return value if math.isfinite(value) and value >= 0 else math.nan

    @property
    def skipped(self) -> int:
        """Number of steps that were not applied because a gradient was not finite."""
        return int(self.ds.skipped_steps) + self._dropped

    @property
    def scales_loss(self) -> bool:
        """Tell whether skipped steps also adapt the loss scale (fp16)."""
        return self.config["fp16"]["enabled"]

    def optimizer_bytes(self) -> dict[str, int]:
        """Return the bytes of optimizer states on this rank; see `partitions.optimizer_bytes`."""
        partitions.ensure_states(self.ds)
        return partitions.optimizer_bytes(self.ds)

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


def _read_once(module: nn.Module) -> None:
    """Read a weight on nvme once if DeepSpeed's prefetch lists it twice.

    DeepSpeed 0.19 itself rejects such a list.
    """
    swappers = {
        id(p.nvme_swapper): p.nvme_swapper
        for p in module.parameters()
        if getattr(p, "nvme_swapper", None)
    }
    for swapper in swappers.values():
        swapper.swap_in = partial(_swap_in_once, swapper.swap_in)


def _swap_in_once(swap_in, params: list[nn.Parameter], *args, **kwargs):
    return swap_in(list({id(p): p for p in params}.values()), *args, **kwargs)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Disable torch.compile while DeepSpeed is imported.

    DeepSpeed decorates functions of an optimizer that is never used here (Muon) with torch.compile,
    which imports all of torch's compiler: most of a second and 41 MiB in every rank.
    """
    compile_, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_  # type: ignore[assignment]


def _as_it_is(function=None, **_):
    return function if function is not None else _as_it_is


def _take_norms_by_rows(optimizer) -> None:
    """Pass row norms instead of gradients to ZeRO's gradient norm, to save memory.

    ZeRO converts its input to fp64, which takes 1.7 GB for GPT-J's head alone.
    """
    whole = getattr(optimizer, "get_grad_norm_direct", None)
    if whole is None:
        return

    def by_rows(gradients, params, norm_type=2):
        if norm_type != 2:
            return whole(gradients, params, norm_type)
        return whole(
            [row_norms(g) for g in gradients if not getattr(g, "_zero_padding", False)],
            params,
            norm_type,
        )

    optimizer.get_grad_norm_direct = by_rows


def row_norms(gradient: Tensor) -> Tensor:
    """Return fp32 norms of consecutive parts of a flattened gradient.

    The norm of these norms is the norm of the gradient.
    """
    flat = gradient.reshape(-1)
    whole = len(flat) // NORM_ROW * NORM_ROW
    rows = flat[:whole].view(-1, NORM_ROW).split(NORM_PIECE[flat.device.type] // NORM_ROW)
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in rows]
    return torch.cat(
        [*parts, torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).reshape(1)]
    )
