"""Locate this rank's part of DeepSpeed's fp32 master weights and their moments, per parameter.

Every ZeRO stage cuts parameters into ranges of their flattened elements. This module finds, for
each trained parameter, the range that this rank owns and the tensors that hold it, in one form for
all stages. Checkpoints, elastic resume and byte counts need nothing else. The module depends on
DeepSpeed's optimizer wrappers (0.19) and on no file format. `engine` is a `sharding.Engine`.

    parameter  [ 0 . . . . . . . . 11 ]      12 elements, flattened
    rank 0     [ 0 . . . . . ]               Fragment(start=0, numel=7)
    rank 1                   [ . . . . 11 ]  Fragment(start=7, numel=5)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.sharding import optimizers


@dataclass
class Fragment:
    """Elements from `start` on of one parameter on this rank.

    The tensors are fp32 and flat: "master", a view into the optimizer's own memory, and its moments
    by name.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


def ensure_states(engine) -> None:
    """Create the optimizer's states (zeros, step 0) if the first step has not done so yet."""
    for group, master in enumerate(masters(engine)):
        if not engine.optimizer.state[master]:
            with in_memory(engine, group, write=True):
                optimizers.create_states(engine.optimizer, master)


def _on_nvme(engine, group: int) -> bool:
    """Tell whether the states of a group (a sub-group at stage 3) are in files between steps."""
    optimizer = engine.wrapper
    return getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(
        group
    )


@contextmanager
def in_memory(engine, group: int, write: bool = False) -> Iterator[None]:
    """Hold a group's master weights and moments in memory if nvme offload keeps them in files.

    Args:
        write: write changes back to the files at the end; otherwise they are lost.
    """
    optimizer = engine.wrapper
    if not _on_nvme(engine, group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if write:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            optimizer._release_swap_buffers(group)


def set_adam_step(engine, step: int) -> None:
    """Set the number of updates applied so far, which Adam's bias correction uses."""
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(float(step))
        elif "step" in state:
            state["step"] = step


def adam_step(engine) -> int:
    steps = {int(state["step"]) for state in engine.optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, f"parameters disagree on the number of updates: {steps}"
    return steps.pop() if steps else 0


def optimizer_bytes(engine) -> dict[str, int]:
    """Return the bytes of this rank's master weights and moments, including those on nvme.

    The keys are "masters", "moments" and "total". There is no separate master if the weights
    themselves are fp32 and whole (stage 0).
    """
    weights = {p.data_ptr() for p in engine.module.parameters() if p.dtype == torch.float32}
    held = moments = 0
    for group, flat in enumerate(masters(engine)):
        if _on_nvme(engine, group):
            stored = 4 * engine.wrapper.fp16_partitioned_groups_flat_numel[group]
            held, moments = held + stored, moments + len(optimizers.MOMENTS) * stored
            continue
        if flat.data_ptr() not in weights:
            held += flat.numel() * flat.element_size()
        moments += optimizers.moment_bytes(engine.optimizer, flat)
    return {"masters": held, "moments": moments, "total": held + moments}


def replicated(engine) -> bool:
    """Tell whether every rank holds the same complete states (stage 0)."""
    return _kind(engine) not in (
        "DeepSpeedZeroOptimizer_Stage3",
        "DeepSpeedZeroOptimizer",
        "BF16_Optimizer",
    )


def _kind(engine) -> str:
    return type(engine.wrapper).__name__


def masters(engine) -> list[Tensor]:
    """Return the tensors that hold this rank's master weights, by group (sub-group at stage 3)."""
    optimizer = engine.wrapper
    match _kind(engine):
        case "DeepSpeedZeroOptimizer_Stage3":
            return list(optimizer.fp32_partitioned_groups_flat)
        case "DeepSpeedZeroOptimizer":
            return list(optimizer.single_partition_of_fp32_groups)
        case "BF16_Optimizer":
            return list(optimizer.fp32_groups_flat_partition)
        case "FP16_UnfusedOptimizer":
            return [p for group in optimizer.fp32_groups for p in group]
        case _:
            return [p for group in optimizer.param_groups for p in group["params"]]


def sizes(engine) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Yield name, start and elements by tensor of each of the `fragments`, without reading them."""
    flats = masters(engine)
    for place in _places(engine):
        moments = optimizers.moment_sizes(engine.optimizer, flats[place.group], place.numel)
        yield place.name, place.start, {"master": place.numel, **moments}


def fragments(engine, write: bool = False) -> Iterator[Fragment]:
    """Yield this rank's fragments, always in the same order. States must exist (`ensure_states`).

    A fragment is in memory only until the next one is requested, and changes to it are kept only
    with `write`.
    """

    def part(tensor: Tensor, place: _Place, whole: int) -> Tensor:
        flat = tensor.data.view(-1)
        # A mean over rows or columns belongs to its whole matrix.
        return flat.narrow(0, place.offset, place.numel) if len(flat) == whole else flat

    for group, places in groupby(_places(engine), key=lambda place: place.group):
        with in_memory(engine, group, write):
            master = masters(engine)[group]
            with optimizers.moments(engine.optimizer, master, write) as moments:
                tensors = {"master": master, **moments}
                for place in places:
                    cut = {key: part(t, place, master.numel()) for key, t in tensors.items()}
                    yield Fragment(place.name, place.start, cut)


class _Place(NamedTuple):
    """Position of this rank's part of a parameter in the tensor of masters of a group."""

    name: str
    group: int
    offset: int
    start: int
    numel: int


def _places(engine) -> list[_Place]:
    """Return the places ordered by group, so that each group is read and unpacked only once."""
    wrapper, kind = engine.wrapper, _kind(engine)
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    found = []
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        rank = torch.distributed.get_rank()
        for name, parameter in trained:
            group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = rank * size
            # The last ranks' partitions are padded beyond the parameter's end.
            numel = max(0, min(size, parameter.ds_numel - start))
            if numel:
                found.append(_Place(name, group, offset, start, numel))
    elif not replicated(engine):
        for name, parameter in trained:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                part, start = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
                group = mapping.param_group_index
                found.append(_Place(name, group, part.start, start, part.numel))
    else:
        # Each master is a whole parameter, in the order of the optimizer's groups.
        own = wrapper.fp16_groups if kind == "FP16_UnfusedOptimizer" else [masters(engine)]
        order = {id(p): i for i, p in enumerate(p for group in own for p in group)}
        found = [_Place(name, order[id(p)], 0, 0, p.numel()) for name, p in trained]
    return sorted(found, key=lambda place: place.group)


def refresh_weights(engine, read_master) -> None:
    """Set the weights used in the forward pass from the restored masters: weight = round(master).

    Args:
        read_master: (name, start, numel) -> fp32 values of these elements of the whole parameter,
            from the checkpoint.
    """
    if _kind(engine) != "DeepSpeedZeroOptimizer_Stage3":
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                values = read_master(name, 0, parameter.numel())
                parameter.data.view(-1).copy_(values)
        return
    optimizer = engine.wrapper
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        low = optimizer.fp16_partitioned_groups_flat[i]
        with in_memory(engine, i):
            if low is None:  # weights on nvme
                optimizer._partitioned_params_swap_out(i)
                continue
            if low.data_ptr() != flat.data_ptr():
                low.data.copy_(flat.data)
        views = optimizer.unflatten(low, optimizer.fp16_partitioned_groups[i])
        for partition, view in zip(optimizer.fp16_partitioned_groups[i], views, strict=True):
            partition.data = view.data
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
