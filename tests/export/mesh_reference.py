"""mesh-transformer-jax in numpy, from its description: a state made at random, its checkpoint, and its forward pass.

Shares nothing with the product. Each core computes with its own shard, and results are summed over cores as there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

NORM = "replicated_layer_norm"


def random_state(rng, layers: int, width: int, vocabulary: int, cores: int) -> list[dict]:
    """One pytree per core: {"params": {module: {leaf: array}}, "step": ()}; norms are replicated."""

    def draw(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def norm():
        return {"scale": 1 + draw(width), "offset": draw(width)}

    norms = {f"layer_{i}": norm() for i in range(layers)} | {"projection_shard": norm()}
    states = []
    for _ in range(cores):
        params = {
            "embedding_shard/~/linear": {"w": draw(vocabulary // cores, width), "b": draw(width)},
            "projection_shard/~/linear": {
                "w": draw(width, vocabulary // cores),
                "b": draw(vocabulary // cores),
            },
        }
        for i in range(layers):
            part = width // cores
            shapes = {
                "linear": (width, part),
                "linear_1": (width, part),
                "linear_2": (width, part),
                "linear_3": (part, width),
                "linear_4": (width, 4 * part),
                "linear_5": (4 * part, width),
            }
            for name, shape in shapes.items():
                params[f"layer_{i}/~/{name}"] = {"w": draw(*shape)}
            params[f"layer_{i}/~/linear_4"]["b"] = draw(4 * part)
            params[f"layer_{i}/~/linear_5"]["b"] = draw(width)
        for module, values in norms.items():
            params[f"{module}/~/{NORM}"] = {key: value.copy() for key, value in values.items()}
        named = {
            f"causal_transformer_shard/~/{module}": values for module, values in params.items()
        }
        states.append({"params": named, "step": np.int32(7)})
    return states


def flatten(tree) -> list:
    """As jax flattens dicts: by sorted keys."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in flatten(tree[key])]
    return [tree]


def save(states: list[dict], folder: Path, convert=np.asarray, optimizer: bool = False) -> None:
    """shard_N/0.npz .. 15.npz; with `optimizer` a full checkpoint's leaves in front."""
    for core, state in enumerate(states):
        (folder / f"shard_{core}").mkdir(parents=True)
        params = [convert(leaf) for leaf in flatten(state["params"])]
        front = (
            [np.int32(1), *[p * 0 for p in params], *[p * 0 + 1 for p in params], np.int32(1)]
            if optimizer
            else []
        )
        arrays = [*front, *params, np.asarray(state["step"])]
        size, more = divmod(len(arrays), 16)
        for i in range(16):
            begin, end = i * size + min(i, more), (i + 1) * size + min(i + 1, more)
            np.savez(folder / f"shard_{core}" / f"{i}.npz", *arrays[begin:end])


def forward(states: list[dict], ids: list[int], heads: int, rotary: int) -> np.ndarray:
    """Logits (T, V) in fp64, every core by itself, summed where the original has psum."""
    trees = [
        {k.removeprefix("causal_transformer_shard/~/"): v for k, v in s["params"].items()}
        for s in states
    ]
    cores, rows = len(trees), trees[0]["embedding_shard/~/linear"]["w"].shape[0]
    x = 0.0
    for core, tree in enumerate(trees):
        leaf = tree["embedding_shard/~/linear"]
        onehot = (np.array(ids)[:, None] - core * rows == np.arange(rows)).astype(np.float64)
        x = x + onehot @ leaf["w"] + leaf["b"]
    layers = 1 + max(int(k.split("/")[0][6:]) for k in trees[0] if k.startswith("layer_"))
    for i in range(layers):
        x = x + sum(_layer(tree, f"layer_{i}/~/", x, heads // cores, rotary) for tree in trees)
    logits = []
    for tree in trees:
        leaf = tree["projection_shard/~/linear"]
        logits.append(_norm(x, tree[f"projection_shard/~/{NORM}"]) @ leaf["w"] + leaf["b"])
    return np.concatenate(logits, -1)


def _layer(tree: dict, prefix: str, x: np.ndarray, heads: int, rotary: int) -> np.ndarray:
    x = _norm(x, tree[prefix + NORM])
    q, v, k = (
        np.reshape(x @ tree[prefix + name]["w"], (len(x), heads, -1))
        for name in ("linear", "linear_1", "linear_2")
    )
    q, k = _rotate(q, rotary), _rotate(k, rotary)
    scores = np.einsum("thd,Thd->htT", q, k) / np.sqrt(q.shape[-1]) - 1e10 * (
        1 - np.tril(np.ones((len(x), len(x))))
    )
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("htT,Thd->thd", weights, v).reshape(len(x), -1)
    inner = x @ tree[prefix + "linear_4"]["w"] + tree[prefix + "linear_4"]["b"]
    inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    out = tree[prefix + "linear_5"]
    return attended @ tree[prefix + "linear_3"]["w"] + inner @ out["w"] + out["b"]


def _norm(x: np.ndarray, leaf: dict) -> np.ndarray:
    return (
        leaf["scale"] * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        + leaf["offset"]
    )


def _rotate(x: np.ndarray, size: int) -> np.ndarray:
    """The first `size` dimensions, in neighbouring pairs."""
    angles = np.outer(np.arange(len(x)), 1 / 10000 ** (np.arange(0, size, 2) / size))[:, None]
    even, odd = x[..., :size:2], x[..., 1:size:2]
    turned = np.stack(
        [
            even * np.cos(angles) - odd * np.sin(angles),
            odd * np.cos(angles) + even * np.sin(angles),
        ],
        -1,
    )
    return np.concatenate([turned.reshape(*x.shape[:-1], size), x[..., size:]], -1)
