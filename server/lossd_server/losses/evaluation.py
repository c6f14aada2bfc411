"""What evaluating a loss gives: the value, its gradients, and the sums it came from."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.checks import first_position
from lossd_server.losses.arrays import are_finite, as_array, non_finite
from lossd_server.losses.presets import LossPreset

TensorOrLevels = Tensor | list[Tensor]
"""One tensor, or one for each pyramid level."""

Numbers = NDArray[np.float64] | Tensor
"""A few float64 numbers: numpy's on the host, on a GPU a tensor, so that nobody waits for it."""

Place = Callable[[str], list[NDArray[Any]]]
"""Returns the arrays that the gradient of an input is written to, one or one a level: see `are_places`."""

_NOTHING: Mapping[str, Any] = {}

_LARGEST = float(np.finfo(np.float32).max)


class EvaluationOptions(NamedTuple):
    """What is wanted beside the value.

    Attributes:
        gradients: Names of the inputs whose gradient is wanted.
        gradient_dtype: Type of the gradients; None means each input's own.
        component_gradients: If true, gradients are of the component that the input feeds, before the
            component's weight; if false, of the loss.
        normalizer: What a mean is divided by in place of the item's own count.
        outputs: Tensors that gradients are written to, by input name: dense, in the shape of the
            input, one or one a level. Where there is none, a new one is made.
        allocate: Makes memory for a new one on the host: takes a number of bytes, and returns an array of as
            many, or None where torch's own are as good. None means torch's own.
        nonzero_rows: Whether to say where alone a gradient can be other than zero.
    """

    gradients: tuple[str, ...] = ()
    gradient_dtype: torch.dtype | None = None
    component_gradients: bool = False
    normalizer: float | None = None
    outputs: Mapping[str, Sequence[Tensor]] = _NOTHING
    allocate: Callable[[int], NDArray[np.uint8] | None] | None = None
    nonzero_rows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One term of a loss: `loss = Σ weight · value`; weight 0 is only reported."""

    name: str
    value: float | Tensor
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """An input that holds NaN or infinity: which, how many, and where the first one lies."""

    input: str
    count: int
    first_index: tuple[int, ...]


class Evaluation(NamedTuple):
    """The outcome of evaluating a loss on one item.

    Attributes:
        loss: 0-d, or `[rows]` under the reduction `none`; float64 for float64 inputs, else float32.
        components: The terms of the loss; empty where it has just one.
        gradients: By input name, in the shape of the input.
        raw_sums: By the contract's name, `[levels]` each: sums before weights and division.
        preset: Whose numbers these are; None for a custom loss.
        kept_rows: Which flattened target positions `loss` is of, where some are left out.
        negative_side_count: Positives whose predicted distances have a negative side.
        finite_inputs: Inputs that were seen to hold neither NaN nor infinity, as `name` or `name[level]`.
        nonzero_rows: By input name, the places of each level along `[B, H, W]`, ascending, outside which
            its gradient is exactly zero. Where such are known, and asked for.
    """

    loss: Tensor
    components: tuple[Component, ...] = ()
    gradients: Mapping[str, TensorOrLevels] = _NOTHING
    raw_sums: Mapping[str, Numbers] = _NOTHING
    preset: LossPreset | None = None
    kept_rows: Tensor | None = None
    negative_side_count: float | Tensor = 0
    finite_inputs: frozenset[str] = frozenset()
    nonzero_rows: Mapping[str, Sequence[NDArray[np.int64]]] = _NOTHING


class LossOutcome(NamedTuple):
    """An `Evaluation` on the host: numpy alone, but for gradients that were written to a GPU's memory.

    Attributes:
        loss: 0-d, or one number a row.
        components: Name, value and weight of each term; empty where the loss has just one.
        gradients: By input name, one array or one a level.
        raw_sums: By the contract's name, one mapping a level.
        non_finite: Inputs that hold NaN or infinity.
        preset: Whose numbers these are; None for a custom loss.
        kept_rows: Which flattened target positions `loss` is of, where some are left out.
        negative_side_count: Positives whose predicted distances have a negative side.
        nonzero_rows: Outside which places along `[B, H, W]` a gradient is exactly zero, as in `Evaluation`.
    """

    loss: NDArray[Any]
    components: Sequence[tuple[str, float, float]] = ()
    gradients: Mapping[str, Sequence[Any]] = _NOTHING
    raw_sums: Sequence[Mapping[str, float]] = ()
    non_finite: Sequence[NonFinite] = ()
    preset: LossPreset | None = None
    kept_rows: NDArray[Any] | None = None
    negative_side_count: int = 0
    nonzero_rows: Mapping[str, Sequence[NDArray[np.int64]]] = _NOTHING

    @property
    def positive_count(self) -> int:
        """Rows or locations that carry an object, over all levels."""
        count = 0.0
        for level in self.raw_sums:
            count += level["positive_count"]
        return int(count)


def fixed_order_sum(values: Tensor) -> Tensor:
    """Returns the sum of all values, 0-d float64, with the same bits whatever the number of threads."""
    if values.is_cuda:
        return values.sum(dtype=torch.float64)
    return torch.tensor(values.numpy().sum(dtype=np.float64), dtype=torch.float64)


def stacked(sums: Sequence[Tensor]) -> Numbers:
    """Returns 0-d sums as `Numbers`, `[len(sums)]`."""
    together = torch.stack(list(sums))
    return together if together.is_cuda else together.numpy()


def as_tensor(number: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns one of `Numbers`, or a sum of them, as a 0-d tensor where another one lies."""
    if isinstance(number, Tensor):
        return number.to(dtype)
    try:
        return torch.scalar_tensor(number, dtype=dtype, device=like.device)
    except RuntimeError:  # beyond the type: torch makes infinity of that in a cast alone
        return torch.scalar_tensor(number, dtype=torch.float64, device=like.device).to(dtype)


def as_float32(number: float) -> NDArray[np.float32] | None:
    """Returns a number as a 0-d array; None where it is NaN or beyond the type."""
    return np.array(number, np.float32) if abs(number) <= _LARGEST else None


def to_float64(tensor: Tensor) -> Tensor:
    """Returns a tensor in float64; on a CPU by numpy, which wakes no helpers."""
    return tensor.double() if tensor.is_cuda else torch.from_numpy(as_array(tensor).astype(np.float64))


@dataclass(frozen=True, kw_only=True, slots=True)
class FiniteCheck:
    """A look for NaN and infinity whose answer may still be on its way from a GPU.

    Attributes:
        tensors: What is looked at, by name.
        totals: A number of each, `[len(tensors)]`, that is finite only where all of it is: one pass without
            a mask clears the ordinary case.
    """

    tensors: Sequence[tuple[str, Tensor]]
    totals: Numbers

    @classmethod
    def begin(
        cls, arguments: Mapping[str, object], finite_inputs: frozenset[str] = frozenset()
    ) -> "FiniteCheck | None":
        """Looks at the floating-point arguments, if there are any to be looked at.

        Args:
            arguments: Tensors, and lists of tensors, by name; anything else is passed over.
            finite_inputs: Those that need not be looked at, as in `Evaluation`.
        """
        named = [
            (path, tensor)
            for name, value in arguments.items()
            for path, tensor in _tensors_in(name, value)
            if tensor.is_floating_point() and tensor.numel() and path not in finite_inputs
        ]
        return cls(tensors=named, totals=_totals([tensor for _, tensor in named])) if named else None

    def end(self, totals: Iterable[float]) -> list[NonFinite]:
        """Returns those that hold NaN or infinity, in order, given the totals on the host.

        Numbers whose sum is beyond float32 look the same, and are cleared by a second look.
        """
        suspects = [
            pair for pair, total in zip(self.tensors, totals, strict=True) if not math.isfinite(total)
        ]
        return [found for name, tensor in suspects if (found := _non_finite(name, tensor)) is not None]


def find_non_finite(
    arguments: Mapping[str, object], finite_inputs: frozenset[str] = frozenset()
) -> list[NonFinite]:
    """Returns what a `FiniteCheck` finds, at once."""
    check = FiniteCheck.begin(arguments, finite_inputs)
    return check.end(check.totals.tolist()) if check else []


def _totals(tensors: Sequence[Tensor]) -> Numbers:
    """Returns the `totals` of a `FiniteCheck`. Where all tensors are of a GPU, nothing waits for it."""
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    largest = [each.double() for each in torch._foreach_norm(on_gpu, torch.inf)] if on_gpu else []  # noqa: SLF001
    if len(on_gpu) == len(tensors):
        return torch.stack(largest)
    left = iter(largest)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([float(next(left)) if t.is_cuda else _total_on_host(t) for t in tensors])


def _total_on_host(tensor: Tensor) -> float:
    """Returns a number that is finite only where all of a tensor is; by numpy, which wakes no helpers."""
    if tensor.dtype in {torch.float32, torch.float64}:
        return float(tensor.numpy().sum())
    return 0.0 if are_finite(as_array(tensor)) else math.nan


def _tensors_in(name: str, value: object) -> Sequence[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, list):
        return [(f"{name}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, Tensor)]
    return []


def _non_finite(name: str, tensor: Tensor) -> NonFinite | None:
    stray = (~torch.isfinite(tensor)).numpy(force=True) if tensor.is_cuda else non_finite(as_array(tensor))
    count = int(np.count_nonzero(stray))
    return NonFinite(input=name, count=count, first_index=tuple(first_position(stray))) if count else None
