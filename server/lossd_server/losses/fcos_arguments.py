"""The settings and arguments of an FCOS loss: their names, and what is refused about them."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.losses.locations import LevelTargets, from_dense, host_levels
from lossd_server.losses.module import Arguments

E = TypeVar("E", bound=StrEnum)

PREDICTIONS = ("cls_preds", "reg_preds", "centerness_preds")
DENSE_TARGETS = ("cls_targets", "reg_targets", "centerness_targets")
COMPONENTS = ("cls_loss", "reg_loss", "centerness_loss")
"""The component that each of `PREDICTIONS` feeds, in order."""


def arguments_by_name(
    cls_preds: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    centerness_preds: Sequence[Tensor],
    cls_targets: Sequence[Any] | None,
    reg_targets: Sequence[Tensor] | None,
    centerness_targets: Sequence[Tensor] | None,
    ignored_targets: Sequence[Tensor] | None,
    *,
    ground_truth: Sequence[Any] | None,
) -> Arguments:
    """Returns the arguments of `FCOSLoss.forward` by name, ground truth told from dense targets."""
    if ground_truth is None and reg_targets is None and centerness_targets is None:
        ground_truth, cls_targets = cls_targets, None
    return {
        "cls_preds": cls_preds,
        "reg_preds": reg_preds,
        "centerness_preds": centerness_preds,
        "cls_targets": cls_targets,
        "reg_targets": reg_targets,
        "centerness_targets": centerness_targets,
        "ignored_targets": ignored_targets,
        "ground_truth": ground_truth,
    }


def check_predictions(arguments: Arguments, num_classes: int) -> list[tuple[int, int, int]]:
    """Returns batch size, height and width of each level; raises `InvalidInputError` for a misfit."""
    cls_preds = arguments["cls_preds"]
    if not len(cls_preds):
        raise InvalidInputError(Reason.MISSING_FIELD, "has no levels", field="cls_preds")
    for name in PREDICTIONS[1:]:
        checks.require_count(name, len(arguments[name]), "cls_preds", len(cls_preds))
    sizes: list[tuple[int, int, int]] = []
    checks.require_shape("cls_preds[0]", cls_preds[0], ["B", num_classes, "H", "W"])
    batch = cls_preds[0].shape[0]
    for level, cls_pred in enumerate(cls_preds):
        checks.require_shape(f"cls_preds[{level}]", cls_pred, [batch, num_classes, "H", "W"])
        _, _, height, width = cls_pred.shape
        sizes.append((batch, height, width))
        for name, channels in zip(PREDICTIONS, (num_classes, 4, 1), strict=True):
            field, pred = f"{name}[{level}]", arguments[name][level]
            checks.require_dtype(field, pred, checks.FLOATS)
            checks.require_shape(field, pred, [batch, channels, height, width])
    return sizes


def check_dense_targets(arguments: Arguments, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Raises `InvalidInputError` unless dense targets fit the levels."""
    for name in DENSE_TARGETS:
        if arguments.get(name) is None:
            raise InvalidInputError(
                Reason.MISSING_FIELD, "is not set, and neither is ground_truth", field=name
            )
        checks.require_count(name, len(arguments[name]), "cls_preds", len(sizes))
    for level, (batch, height, width) in enumerate(sizes):
        expected = ([batch, height, width], [batch, 4, height, width], [batch, height, width])
        types = (checks.INTEGERS, checks.FLOATS, checks.FLOATS)
        for name, shape, allowed in zip(DENSE_TARGETS, expected, types, strict=True):
            field, target = f"{name}[{level}]", arguments[name][level]
            checks.require_dtype(field, target, allowed)
            checks.require_shape(field, target, shape)
    if arguments.get("ignored_targets"):
        _check_ignored(arguments["ignored_targets"], sizes)


def read_dense_targets(arguments: Arguments, num_classes: int) -> list[LevelTargets]:
    """Returns what dense targets hold; raises `InvalidInputError` for a value that cannot be.

    Distances and centerness are read at locations with an object, and nowhere else.
    """
    cls, reg, centerness = (host_levels(arguments[name]) for name in DENSE_TARGETS)
    for level, classes in enumerate(cls):
        checks.require_labels(f"cls_targets[{level}]", classes, num_classes=num_classes)
    ignored = arguments.get("ignored_targets")
    levels = from_dense(cls, reg, centerness, host_levels(ignored) if ignored else None)
    for level, (targets, classes) in enumerate(zip(levels, cls, strict=True)):
        row, column = np.divmod(targets.cell, max(classes.shape[2], 1))
        positions = np.stack([targets.image, row, column], axis=1)
        checks.require_upright_distances(f"reg_targets[{level}]", targets.ltrb, positions)
        checks.require_unit_interval(f"centerness_targets[{level}]", targets.centerness, positions)
    return levels


def _check_ignored(ignored: Sequence[Any], sizes: Sequence[tuple[int, int, int]]) -> None:
    checks.require_count("ignored_targets", len(ignored), "cls_preds", len(sizes))
    for level, (target, size) in enumerate(zip(ignored, sizes, strict=True)):
        checks.require_dtype(f"ignored_targets[{level}]", target, ("bool",))
        checks.require_shape(f"ignored_targets[{level}]", target, size)


def component_weight(name: str, value: float | None, alias: str, alias_value: float | None) -> float:
    """Returns a component's weight, given under its name or under the documented one; 1 by default."""
    if value is not None and alias_value is not None:
        raise InvalidInputError(Reason.UNEXPECTED_FIELD, f"is given, and so is {alias}", field=name)
    weight = alias_value if value is None else value
    if weight is None:
        return 1.0
    checks.require_number(name, weight, at_least=0)
    return weight


def member_named(kind: type[E], name: str, field: str) -> E:
    """Returns the member of that name; raises `InvalidInputError` when there is none."""
    try:
        return kind(name)
    except ValueError:
        raise InvalidInputError(
            Reason.INVALID_OPTION,
            f"is {name!r}, want one of {', '.join(kind)}",
            field=field,
            value=name,
            allowed=", ".join(kind),
        ) from None
