"""The compiled focal kernel, called with tensors or arrays."""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.kernels import address_of, loaded_library
from lossd_server.losses.arrays import A, address
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.native.numbers import FLOAT_TYPES, thread_count

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""

LABEL_TYPES = {
    dtype: number
    for number, names in enumerate(
        (("int8",), ("uint8",), ("int16",), ("uint16",), ("int32", "uint32"), ("int64", "uint64"))
    )
    for name in names
    for dtype in (np.dtype(name), getattr(torch, name))
}
"""Types of labels, numpy's and torch's, by their numbers in focal.c."""

_MATRIX = 2


_GRID = Struct(
    "5P"  # logits, gradient, labels, ignored, rows
    "3q"  # batch, classes, cells
    "3q3q"  # how far images, classes and cells are apart: logits, gradient
    "2q"  # how far images are apart: labels, ignored
    "d"  # scale
    "4i"  # types of logits, gradient and labels; background
)
"""`focal_grid` of focal.c."""


class _Constants(ctypes.Structure):
    """`focal_constants` of focal.c."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("negative_weight", "positive_weight")),
        ("gamma", ctypes.c_int32),
    )


def focal_sums_natively(grids: Sequence[FocalGrid[A]], constants: FocalConstants) -> FocalSums | None:
    """Returns what `focal_sums` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, for every type but float64, for whole gammas up to 4, and where the locations of
    each image lie at one distance from each other.
    """
    library, weights = loaded_library(), _weights(constants)
    if library is None or weights is None:
        return None
    problems, size = [], 0
    for grid in grids:
        arrays = grid.logits, grid.gradient, grid.labels, grid.ignored, grid.rows
        frame = _frame(*map(_form, arrays))
        if frame is None:
            return None
        problems.append(
            _GRID.pack(*map(address, arrays), *frame.layout, grid.scale, *frame.types, grid.background)
        )
        size += frame.size
    losses = np.empty(len(grids))
    threads = thread_count(size, _SMALL)
    stray = library.lossd_focal(b"".join(problems), len(grids), weights, threads, address_of(losses))
    if stray < 0:
        raise MemoryError
    return FocalSums(losses=losses, finite=not stray)


def focal_sum_of_arrays(
    logits: NDArray[Any],
    labels: NDArray[Any],
    gradient: NDArray[Any] | None,
    scale: float,
    constants: FocalConstants,
) -> FocalSums | None:
    """Returns what `focal_sums_natively` does of one grid of plain arrays, sooner.

    Args:
        logits: As in `FocalGrid`, dense.
        labels: Likewise.
        gradient: A dense array like the logits, of any type; None if not wanted.
        scale: As in `FocalGrid`.
        constants: Those of the loss.
    """
    library, weights = loaded_library(), _weights(constants)
    wanted = None if gradient is None else gradient.dtype
    frame = _frame_of_arrays(logits.dtype, logits.shape, logits.strides, labels.dtype, labels.shape, wanted)
    if library is None or weights is None or frame is None:
        return None
    place = 0 if gradient is None else address_of(gradient)
    problem = _GRID.pack(
        address_of(logits), place, address_of(labels), 0, 0, *frame.layout, scale, *frame.types, 0
    )
    losses = np.empty(1)
    stray = library.lossd_focal(problem, 1, weights, thread_count(frame.size, _SMALL), address_of(losses))
    if stray < 0:
        raise MemoryError
    return FocalSums(losses=losses, finite=not stray)


@lru_cache
def _weights(constants: FocalConstants) -> Any:
    """Returns the constants in the kernel's terms, None where it does not know the gamma."""
    if not constants.has_kernel:
        return None
    weights = constants.negative_weight, constants.positive_weight
    return ctypes.byref(_Constants(*weights, int(constants.gamma)))


class _Form(NamedTuple):
    """All that matters of an array but where it lies; `steps` are strides that count an element as `unit`."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    unit: int
    dtype: Any
    is_dense: bool
    is_on_host: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """How many elements neighbours along each axis are apart."""
        return tuple(step // self.unit for step in self.steps)


def _form(array: Tensor | NDArray[Any] | None) -> _Form | None:
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        steps, unit, dense = array.strides, array.itemsize, array.flags.c_contiguous
        return _Form(array.shape, steps, unit, array.dtype, dense, True)  # noqa: FBT003
    return _Form(array.shape, array.stride(), 1, array.dtype, array.is_contiguous(), array.is_cpu)


class _Frame(NamedTuple):
    """What is the same for all grids whose arrays are of the same forms.

    Attributes:
        size: How many logits there are.
        layout: What `_GRID` has between pointers and scale.
        types: The types at its end.
    """

    size: int
    layout: tuple[int, ...]
    types: tuple[int, ...]


@lru_cache(maxsize=1024)
def _frame(
    logits: _Form, gradient: _Form | None, labels: _Form, ignored: _Form | None, rows: _Form | None
) -> _Frame | None:
    """Returns the frame of a grid; None where the kernel does not apply."""
    if not all(form is None or form.is_on_host for form in (logits, gradient, labels, ignored, rows)):
        return None
    like = gradient or logits
    are_known = logits.dtype in FLOAT_TYPES and like.dtype in FLOAT_TYPES and labels.dtype in LABEL_TYPES
    layout, layout_of_gradient = _layout(logits), _layout(like)
    if not are_known or layout is None or layout_of_gradient is None or not (rows is None or rows.is_dense):
        return None
    labels_stride, ignored_stride = _row_stride(labels, layout), _row_stride(ignored, layout)
    if labels_stride is None or ignored_stride is None:
        return None
    strides = *layout.strides, *layout_of_gradient.strides, labels_stride, ignored_stride
    return _Frame(
        size=math.prod(layout.extents),
        layout=(*layout.extents, *strides),
        types=(FLOAT_TYPES[logits.dtype], FLOAT_TYPES[like.dtype], LABEL_TYPES[labels.dtype]),
    )


@lru_cache(maxsize=1024)
def _frame_of_arrays(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    label_dtype: np.dtype[Any],
    label_shape: tuple[int, ...],
    gradient_dtype: np.dtype[Any] | None,
) -> _Frame | None:
    """Returns the frame of plain arrays: of logits with these strides, and of what is dense beside them."""
    logits = _Form(shape, strides, dtype.itemsize, dtype, is_dense=True, is_on_host=True)
    gradient = None if gradient_dtype is None else _dense_form(shape, gradient_dtype)
    return _frame(logits, gradient, _dense_form(label_shape, label_dtype), None, None)


def _dense_form(shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Form:
    steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _Form(shape, steps, 1, dtype, is_dense=True, is_on_host=True)


class _Layout(NamedTuple):
    """How many images, classes and locations there are, and how far neighbours of each are apart."""

    extents: tuple[int, int, int]
    strides: tuple[int, int, int]


def _row_stride(form: _Form | None, layout: _Layout) -> int | None:
    """Returns how far the locations of one image are from those of the next; None where they have no row."""
    if form is None:
        return 0
    if form.is_dense:
        return layout.extents[2]
    return form.strides[0] if len(form.shape) == _MATRIX and form.strides[1] == 1 else None


def _layout(form: _Form) -> _Layout | None:
    """Returns the layout of logits of so many dimensions; None where locations are not at one distance."""
    match form.shape, form.strides:
        case (cells, classes), (cell, each_class):
            return _Layout((1, classes, cells), (0, each_class, cell))
        case (batch, classes, cells), (image, each_class, cell):
            return _Layout((batch, classes, cells), (image, each_class, cell))
        case (batch, classes, height, width), (image, each_class, down, across) if down == width * across:
            return _Layout((batch, classes, height * width), (image, each_class, across))
    return None
