"""Classification and regression metrics by scikit-learn and scipy: (targets, decisions) of all examples -> numbers.

Shares are 0 to 1; where there is nothing to divide by they are 0. The libraries are imported when they are first
needed: by an evaluation of this head, on rank 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def single_label_metrics(
    targets: np.ndarray, decided: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """Macro F1 is over the classes that occur among targets or decisions, scikit-learn's own default.

    `confusion[i][j]` counts examples of class i that were taken for class j, in the order of `labels`.
    """
    from sklearn import metrics

    classes = np.arange(len(names))
    return {
        "accuracy": float(metrics.accuracy_score(targets, decided)),
        "f1": float(metrics.f1_score(targets, decided, average="macro", zero_division=0)),
        "examples": len(targets),
        "labels": names,
        "confusion": metrics.confusion_matrix(targets, decided, labels=classes).tolist(),
        "per_class": _per_class(targets, decided, classes, names),
    }


def multi_label_metrics(
    targets: np.ndarray, decided: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """`f1` is the macro average over all labels; `accuracy` asks for all labels of an example to be right."""
    from sklearn import metrics

    wanted, chosen, classes = (
        (targets > 0).astype(int),
        (decided > 0).astype(int),
        np.arange(len(names)),
    )
    if len(names) == 1:  # one column would be taken for two classes, without and with the label
        wanted, chosen, classes = wanted[:, 0], chosen[:, 0], np.array([1])
    macro, micro = (
        float(metrics.f1_score(wanted, chosen, labels=classes, average=average, zero_division=0))
        for average in ("macro", "micro")
    )
    return {
        "accuracy": float(metrics.accuracy_score(wanted, chosen)),
        "f1": macro,
        "micro_f1": micro,
        "examples": len(targets),
        "labels": names,
        "per_class": _per_class(wanted, chosen, classes, names),
    }


def regression_metrics(targets: np.ndarray, decided: np.ndarray) -> dict[str, Any]:
    """`pearson` is None where one side is constant, or there are fewer than two: a correlation is then not defined.

    A model that has diverged answers nan, and so is its `mse`.
    """
    from scipy.stats import pearsonr
    from sklearn import metrics

    if not np.isfinite(decided).all():
        return {"mse": float("nan"), "pearson": None, "examples": len(targets)}
    defined = len(targets) > 1 and np.ptp(targets) > 0 and np.ptp(decided) > 0
    return {
        "mse": float(metrics.mean_squared_error(targets, decided)),
        "pearson": float(pearsonr(targets, decided).statistic) if defined else None,
        "examples": len(targets),
    }


def _per_class(
    targets: np.ndarray, decided: np.ndarray, classes: np.ndarray, names: list[str]
) -> dict[str, Any]:
    from sklearn.metrics import precision_recall_fscore_support

    figures = precision_recall_fscore_support(
        targets, decided, labels=classes, average=None, zero_division=0
    )
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
        for name, p, r, f, n in zip(names, *figures, strict=True)
    }
