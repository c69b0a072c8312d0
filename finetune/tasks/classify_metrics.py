"""Classification and regression metrics from counts: (targets, decisions) of all examples -> numbers.

Equal to scikit-learn's accuracy_score, precision_recall_fscore_support (zero_division=0), confusion_matrix,
mean_squared_error and to scipy's pearsonr; written out because training must not depend on them. Shares are 0 to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def single_label_metrics(targets: np.ndarray, decided: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Macro F1 is over the classes that occur among targets or decisions, as in scikit-learn.

    `confusion[i][j]` counts examples of class i that were taken for class j, in the order of `labels`.
    """
    size = len(names)
    confusion = np.bincount(targets * size + decided, minlength=size * size).reshape(size, size)
    right, truth, taken = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    occurs = (truth + taken) > 0
    return {"accuracy": float(right.sum() / max(1, len(targets))), "f1": float(_f1(right, truth, taken)[occurs].mean()),
            "examples": len(targets), "labels": names, "confusion": confusion.tolist(),
            "per_class": _per_class(right, truth, taken, names)}


def multi_label_metrics(targets: np.ndarray, decided: np.ndarray, names: list[str]) -> dict[str, Any]:
    """`f1` is the macro average over all labels; `accuracy` asks for all labels of an example to be right."""
    wanted, chosen = targets > 0, decided > 0
    right, truth, taken = (wanted & chosen).sum(0), wanted.sum(0), chosen.sum(0)
    return {"accuracy": float((wanted == chosen).all(1).mean()), "f1": float(_f1(right, truth, taken).mean()),
            "micro_f1": float(_f1(right.sum(), truth.sum(), taken.sum())), "examples": len(targets), "labels": names,
            "per_class": _per_class(right, truth, taken, names)}


def regression_metrics(targets: np.ndarray, decided: np.ndarray) -> dict[str, Any]:
    """`pearson` is None where one side is constant: a correlation is then not defined."""
    mse = float(np.square(targets - decided).mean())
    spread = [values - values.mean() for values in (targets, decided)]
    norm = float(np.linalg.norm(spread[0]) * np.linalg.norm(spread[1]))
    pearson = float(np.clip(spread[0] @ spread[1] / norm, -1, 1)) if norm > 0 else None
    return {"mse": mse, "pearson": pearson, "examples": len(targets)}


def _f1(right: np.ndarray, truth: np.ndarray, taken: np.ndarray) -> np.ndarray:
    return _ratio(2 * right, truth + taken)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _per_class(right: np.ndarray, truth: np.ndarray, taken: np.ndarray, names: list[str]) -> dict[str, Any]:
    figures = (_ratio(right, taken), _ratio(right, truth), _f1(right, truth, taken), truth)
    return {name: {"precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
            for name, p, r, f, n in zip(names, *figures, strict=True)}
