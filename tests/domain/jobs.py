"""Jobs of every loss for the engine, in random sizes."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from lossd_server.engine import CustomLoss, Engine, LossItem, LossJob
from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, GIoULoss, LossModule

TYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def _rows(rng: np.random.Generator, size: int, dtype: np.dtype) -> tuple[LossModule, dict[str, Any]]:
    labels = rng.integers(-1, 5, size)
    return FocalLoss(), {"inputs": rng.standard_normal((size, 5)).astype(dtype), "targets": labels}


def _map(rng: np.random.Generator, size: int, dtype: np.dtype) -> tuple[LossModule, dict[str, Any]]:
    logits, labels = rng.standard_normal((2, 3, size, 9)), rng.integers(-1, 3, (2, size, 9))
    return FocalLoss(reduction="none"), {"inputs": logits.astype(dtype), "targets": labels}


def _boxes(rng: np.random.Generator, size: int, dtype: np.dtype) -> tuple[LossModule, dict[str, Any]]:
    corners = np.sort(rng.integers(0, 64, (2, size, 2, 2)), axis=2).reshape(2, size, 4).astype(dtype)
    return GIoULoss(), {"pred_boxes": corners[0], "target_boxes": corners[1]}


def _centerness(rng: np.random.Generator, size: int, dtype: np.dtype) -> tuple[LossModule, dict[str, Any]]:
    pred, target = rng.uniform(0, 1, (2, size)).astype(dtype)
    return CenternessLoss(), {"pred": pred, "target": target}


def _head(rng: np.random.Generator, size: int, dtype: np.dtype) -> tuple[LossModule, dict[str, Any]]:
    channels = {"cls_preds": 3, "reg_preds": 4, "centerness_preds": 1}
    maps = {
        name: [np.abs(rng.standard_normal((1, n, size, 7))).astype(dtype)] for name, n in channels.items()
    }
    truth = [{"boxes": np.array([[1, 2, 30, 40]], np.float32), "labels": np.array([2])}]
    return FCOSLoss(3, strides=(8,), regress_ranges=((-1, 64),)), {**maps, "ground_truth": truth}


MAKERS = {"rows": _rows, "map": _map, "boxes": _boxes, "centerness": _centerness, "head": _head}


def random_job(
    kind: str,
    sizes: list[int],
    seed: int,
    dtype: str = "float32",
    *,
    has_outputs: bool = False,
    **settings: Any,
) -> LossJob:
    """A job of one loss with an item of each size and all gradients, which may have places of their own."""
    rng, items = np.random.default_rng(seed), []
    for place, size in enumerate(sizes):
        loss, arguments = MAKERS[kind](rng, size, TYPES[dtype])
        options = EvaluationOptions(gradients=loss.differentiable)
        outputs = {name: _places(arguments[name]) for name in loss.differentiable} if has_outputs else {}
        items.append(
            LossItem(
                path=f"items[{place}]", arguments=loss.prepare(arguments), options=options, outputs=outputs
            )
        )
    return LossJob(loss=loss, items=items, **settings)


def _places(value: Any) -> list[np.ndarray]:
    return [np.zeros_like(array) for array in (value if isinstance(value, list) else [value])]


def custom_job(module: nn.Module, items: int = 1, **settings: Any) -> LossJob:
    """A job of an operator's module that takes `pred`, each item of one number more than the last."""
    options = EvaluationOptions(gradients=("pred",))
    rows = [np.ones(place + 1, np.float32) for place in range(items)]
    return LossJob(
        loss=CustomLoss(type(module).__name__, module),
        items=[
            LossItem(path=f"items[{place}]", arguments={"pred": row}, options=options)
            for place, row in enumerate(rows)
        ],
        **settings,
    )


def bits_of(outcomes: list[Any]) -> list[Any]:
    """All that outcomes say, to the bit."""
    return [
        (
            outcome.loss.tobytes(),
            list(outcome.components),
            {name: [array.tobytes() for array in arrays] for name, arrays in outcome.gradients.items()},
            outcome.raw_sums,
            list(outcome.non_finite),
            None if outcome.kept_rows is None else outcome.kept_rows.tobytes(),
        )
        for outcome in outcomes
    ]


def cpu_engine(**settings: Any) -> Engine:
    return Engine(torch.device("cpu"), **settings)
