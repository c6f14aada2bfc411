"""Refuses bad tensors before anything computes with them.

Every check takes numpy arrays and torch tensors alike. Shapes and types are read off the object;
values are only read where a check is about values, on the host.
"""

import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lossd_server.errors import InvalidInputError, Reason

FLOATS = ("float32", "float64", "float16", "bfloat16")
_LARGEST_LABEL = 2**63 - 1
"""Labels are computed with, and handed out, as int64."""

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


class ArrayLike(Protocol):
    """A numpy array or a torch tensor."""

    @property
    def shape(self) -> Sequence[int]:
        """Extents, outermost first."""

    @property
    def dtype(self) -> Any:
        """A `numpy.dtype` or a `torch.dtype`."""


def host_array(array: Any) -> NDArray[Any]:
    """Returns the values of an array or tensor as numpy, bfloat16 widened to float32."""
    name = dtype_name(array)
    if isinstance(array, np.ndarray):
        return array.astype(np.float32) if name == "bfloat16" else array
    values: NDArray[Any] = (array.float() if name == "bfloat16" else array).numpy(force=True)
    return values


def dtype_name(array: ArrayLike) -> str:
    """Returns numpy's name of the element type, `bfloat16` included."""
    return _name_of(array.dtype)


@lru_cache(maxsize=64)
def _name_of(dtype: Any) -> str:
    """Returns the name of a numpy or torch dtype; numpy makes it anew each time, and takes long."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def require_dtype(field: str, array: ArrayLike, allowed: Sequence[str]) -> None:
    """Raises `INVALID_DTYPE` unless the element type is one of `allowed`."""
    name = _name_of(array.dtype)
    if name not in allowed:
        raise InvalidInputError(
            Reason.INVALID_DTYPE,
            f"dtype is {name}, want one of {', '.join(allowed)}",
            field=field,
            value=name,
            allowed=", ".join(allowed),
        )


def require_shape(field: str, array: ArrayLike, expected: Sequence[int | str]) -> None:
    """Raises `INVALID_SHAPE` unless the shape fits; a string stands for any extent, by its name."""
    shape = list(array.shape)
    if shape == expected:
        return
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = f"[{', '.join(str(extent) for extent in expected)}]"
        raise InvalidInputError(
            Reason.INVALID_SHAPE,
            f"shape is {shape}, want {wanted}",
            field=field,
            value=shape,
            expected=wanted,
        )


def require_same_rows(field: str, array: ArrayLike, other_field: str, other: ArrayLike) -> None:
    """Raises `INVALID_SHAPE` unless both shapes are equal but for extents of 1."""
    shape, expected = list(array.shape), list(other.shape)
    if [n for n in shape if n != 1] != [n for n in expected if n != 1]:
        raise InvalidInputError(
            Reason.INVALID_SHAPE,
            f"shape is {shape}, want that of {other_field}, {expected}",
            field=field,
            value=shape,
            expected=expected,
        )


def require_count(field: str, count: int, other_field: str, expected: int) -> None:
    """Raises `INVALID_SHAPE` unless a list has as many entries as another."""
    if count != expected:
        raise InvalidInputError(
            Reason.INVALID_SHAPE,
            f"has {count} entries, want {expected} as {other_field}",
            field=field,
            value=count,
            expected=expected,
        )


def require_labels(field: str, labels: Any, *, num_classes: int | None, lowest: int = -1) -> None:
    """Raises `LABEL_OUT_OF_RANGE` at the first label outside `lowest..num_classes - 1`.

    Args:
        field: Name of the field.
        labels: Integers of any shape.
        num_classes: Number of classes, or None where any class goes.
        lowest: Smallest label allowed: -1 where that means "no object".
    """
    values = host_array(labels)
    highest = _LARGEST_LABEL if num_classes is None else num_classes - 1
    if values.size and (values.min() < lowest or values.max() > highest):
        outside = (values < lowest) | (values > highest)
        position = first_position(outside)
        value = int(values[tuple(position)])
        raise InvalidInputError(
            Reason.LABEL_OUT_OF_RANGE,
            f"label at {position} is {value}, want {lowest}..{highest}",
            field=field,
            position=position,
            value=value,
            lowest=lowest,
            highest=highest,
        )


def require_unit_interval(
    field: str, values: NDArray[Any], positions: NDArray[np.int64] | None = None
) -> None:
    """Raises `VALUE_OUT_OF_RANGE` at the first value outside 0..1, NaN included.

    Args:
        field: Name of the field.
        values: Of any shape; or `[P]`, some values of the field.
        positions: Where those stand in the field, `[P, D]`.
    """
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        first = first_position(outside)
        position = first if positions is None else positions[first[0]].tolist()
        value = float(values[tuple(first)])
        raise InvalidInputError(
            Reason.VALUE_OUT_OF_RANGE,
            f"value at {position} is {value}, want 0..1",
            field=field,
            position=position,
            value=value,
        )


def require_upright_boxes(field: str, boxes: NDArray[Any]) -> None:
    """Raises `INVERTED_BOX` at the first xyxy box whose right is before its left, or bottom above top."""
    inverted = (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])
    if inverted.any():
        index = int(inverted.argmax())
        box = boxes[index].tolist()
        raise InvalidInputError(
            Reason.INVERTED_BOX,
            f"box {index} is {box} (x1, y1, x2, y2), want x1 <= x2 and y1 <= y2",
            field=field,
            value=box,
            index=index,
        )


def require_upright_distances(field: str, ltrb: NDArray[Any], positions: NDArray[np.int64]) -> None:
    """Raises `INVERTED_BOX` at the first distances with l + r or t + b below 0.

    Args:
        field: Name of the field.
        ltrb: Distances `[P, 4]`; NaN is refused too.
        positions: Image, row and column of each, `[P, 3]`.
    """
    extents = np.add(ltrb[:, :2], ltrb[:, 2:], dtype=np.float64)
    inverted = ~(extents >= 0).all(axis=1)
    if inverted.any():
        first = int(inverted.argmax())
        position, value = positions[first].tolist(), ltrb[first].tolist()
        raise InvalidInputError(
            Reason.INVERTED_BOX,
            f"distances at {position} are {value} (l, t, r, b), want l + r and t + b at least 0",
            field=field,
            value=value,
            position=position,
        )


def require_finite(field: str, values: NDArray[Any]) -> None:
    """Raises `NOT_FINITE` at the first NaN or infinity."""
    stray = ~np.isfinite(values)
    if stray.any():
        position = first_position(stray)
        value = float(values[tuple(position)])
        raise InvalidInputError(
            Reason.NOT_FINITE,
            f"value at {position} is {value}, want finite",
            field=field,
            position=position,
            value=value,
        )


def require_number(
    field: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Raises `INVALID_OPTION` unless a setting is a finite number within its bounds."""
    wanted = numbers.Integral if whole else numbers.Real
    if not isinstance(value, wanted):
        kind = "a whole number" if whole else "a number"
        raise InvalidInputError(
            Reason.INVALID_OPTION, f"is {value!r}, want {kind}", field=field, value=repr(value)
        )
    bounds = [
        (f"at least {at_least}", at_least is None or value >= at_least),
        (f"above {above}", above is None or value > above),
        (f"at most {at_most}", at_most is None or value <= at_most),
        ("finite", bool(np.isfinite(value))),
    ]
    for want, holds in bounds:
        if not holds:
            raise InvalidInputError(
                Reason.INVALID_OPTION, f"is {value}, want {want}", field=field, value=value, wanted=want
            )


def first_position(mask: NDArray[np.bool_]) -> list[int]:
    """Returns the index of the first true element, row-major."""
    return [int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape)]
