"""What evaluating a loss gives: the value, its gradients, and the sums it came from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lossd_server.losses.presets import LossPreset

TensorOrLevels = Tensor | list[Tensor]
"""One tensor, or one for each pyramid level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """What is wanted beside the value.

    Attributes:
        gradients: Names of the inputs whose gradient is wanted.
        gradient_dtype: Type of the gradients; None means each input's own.
        component_gradients: If true, gradients are of the component that the input feeds, before the
            component's weight; if false, of the loss.
        normalizer: What a mean is divided by in place of the item's own count.
    """

    gradients: tuple[str, ...] = ()
    gradient_dtype: torch.dtype | None = None
    component_gradients: bool = False
    normalizer: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One term of a loss: `loss = Σ weight · value`; weight 0 is only reported."""

    name: str
    value: Tensor
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """An input that holds NaN or infinity: which, how many, and where the first one lies."""

    input: str
    count: int
    first_index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The outcome of evaluating a loss on one item.

    Attributes:
        loss: 0-d, or `[rows]` under the reduction `none`; float64 for float64 inputs, else float32.
        components: The terms of the loss; empty where it has just one.
        gradients: By input name, in the shape of the input.
        raw_sums: By the contract's name, `[levels]` float64: sums before weights and division.
        preset: Whose numbers these are; None for a custom loss.
        kept_rows: Which flattened target positions `loss` is of, where some are left out.
        negative_side_count: Positives whose predicted distances have a negative side, 0-d.
    """

    loss: Tensor
    components: tuple[Component, ...] = ()
    gradients: Mapping[str, TensorOrLevels] = field(default_factory=dict)
    raw_sums: Mapping[str, Tensor] = field(default_factory=dict)
    preset: LossPreset | None = None
    kept_rows: Tensor | None = None
    negative_side_count: Tensor | None = None


def fixed_order_sum(values: Tensor) -> Tensor:
    """Returns the sum of all values, 0-d float64, with the same bits whatever the number of threads."""
    if values.is_cuda:
        return values.sum(dtype=torch.float64)
    return torch.tensor(values.numpy().sum(dtype=np.float64), dtype=torch.float64)


def find_non_finite(arguments: Mapping[str, object]) -> list[NonFinite]:
    """Returns the floating-point arguments that hold NaN or infinity, in order.

    Args:
        arguments: Tensors, and lists of tensors, by name; anything else is passed over.
    """
    named = [
        (name if index is None else f"{name}[{index}]", tensor)
        for name, value in arguments.items()
        for index, tensor in _tensors_in(value)
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not named:
        return []
    # NaN and infinity survive a sum, so one pass without a mask clears the ordinary case, and one wait
    # all tensors. Numbers whose sum is beyond float32 look the same, and are cleared by a second look.
    sums = torch.stack([tensor.sum(dtype=_sum_dtype(tensor)).double() for _, tensor in named])
    suspects = [pair for pair, total in zip(named, sums.tolist(), strict=True) if not math.isfinite(total)]
    return [found for name, tensor in suspects if (found := _non_finite(name, tensor)) is not None]


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _tensors_in(value: object) -> Sequence[tuple[int | None, Tensor]]:
    if isinstance(value, Tensor):
        return [(None, value)]
    if isinstance(value, list):
        return [(i, entry) for i, entry in enumerate(value) if isinstance(entry, Tensor)]
    return []


def _non_finite(name: str, tensor: Tensor) -> NonFinite | None:
    stray = ~torch.isfinite(tensor)
    count = int(stray.sum())
    if not count:
        return None
    first = torch.unravel_index(stray.flatten().int().argmax(), tensor.shape)
    return NonFinite(input=name, count=count, first_index=tuple(int(i) for i in first))
