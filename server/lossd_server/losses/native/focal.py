"""The compiled focal kernel, called with tensors."""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from lossd_server.losses.native.library import loaded_library

_IGNORED = -2
_MAX_CELLS = 8192
_LARGEST_GAMMA = 4

_CONVERTED_AT_ONCE = 1 << 19
"""Logits of another type that are converted together: they stay in the cache."""

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""


class _Problem(ctypes.Structure):
    """`focal_problem` of focal.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "gradient", "rows")),
        *((name, ctypes.c_int64) for name in ("batch", "classes", "cells")),
        *((f"logits_{name}_stride", ctypes.c_int64) for name in ("batch", "class", "cell")),
        *((f"gradient_{name}_stride", ctypes.c_int64) for name in ("batch", "class", "cell")),
        ("cells_of_task", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("negative_weight", "positive_weight")),
        ("scale", ctypes.c_void_p),
        ("gamma", ctypes.c_int32),
    )


def focal_rows_natively(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    gamma: float,
    weights: tuple[float, float],
    gradient: Tensor | None,
    scale: Tensor | None,
) -> Tensor | None:
    """Returns what `focal_rows` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, for logits whose cells or classes lie side by side, and for whole gammas up
    to 4. Other types than float32 are converted portion by portion.

    Args:
        logits: `[B, C, S]`.
        labels: `[B, S]` int64.
        valid: `[B, S]` bool.
        gamma: Focusing parameter.
        weights: Of negatives and of positives.
        gradient: `[B, C, S]`, written if given.
        scale: What the gradient is multiplied by, 0-d float64; required with `gradient`.
    """
    library = loaded_library()
    if library is None or not _applies(logits, gradient, gamma):
        return None
    marked = torch.where(valid, labels, _IGNORED).to(torch.int32)
    rows = torch.empty(labels.shape, dtype=torch.float32)
    for images in _portions(logits, gradient):
        wide = logits[images].float()
        given = None if gradient is None else gradient[images]
        slopes = given
        if given is not None and given.dtype != torch.float32:
            slopes = torch.empty_like(given, dtype=torch.float32)  # laid out as `_applies` saw it
        problem = _problem(wide, marked[images], rows[images], slopes, scale, weights, int(gamma))
        library.lossd_focal(ctypes.byref(problem), ctypes.c_int(_threads(wide)))
        if given is not None and slopes is not None and slopes is not given:
            given.copy_(slopes)
    return rows


def _portions(logits: Tensor, gradient: Tensor | None) -> Iterator[slice]:
    """Yields all images at once, or a few at a time where they have to be converted."""
    converted = any(t is not None and t.dtype != torch.float32 for t in (logits, gradient))
    images, classes, cells = logits.shape
    step = max(_CONVERTED_AT_ONCE // max(classes * cells, 1), 1) if converted else max(images, 1)
    return (slice(image, image + step) for image in range(0, images, step))


def _threads(logits: Tensor) -> int:
    return torch.get_num_threads() if logits.numel() >= _SMALL else 1


def _problem(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    gradient: Tensor | None,
    scale: Tensor | None,
    weights: tuple[float, float],
    gamma: int,
) -> _Problem:
    """Returns the problem in the kernel's terms; it points into the tensors."""
    batch, classes, cells = logits.shape
    negative, positive = weights
    return _Problem(
        logits=logits.data_ptr(),
        labels=labels.data_ptr(),
        gradient=None if gradient is None else gradient.data_ptr(),
        rows=rows.data_ptr(),
        batch=batch,
        classes=classes,
        cells=cells,
        cells_of_task=_cells_of_task(batch, cells, _threads(logits)),
        negative_weight=negative,
        positive_weight=positive,
        scale=None if scale is None else scale.data_ptr(),
        gamma=gamma,
        **_strides("logits", logits),
        **_strides("gradient", logits if gradient is None else gradient),
    )


def _applies(logits: Tensor, gradient: Tensor | None, gamma: float) -> bool:
    unit = next((axis for axis in (2, 1) if logits.stride(axis) == 1), None)
    return (
        unit is not None
        and logits.dtype != torch.float64
        and logits.device.type == "cpu"
        and (gradient is None or (gradient.dtype != torch.float64 and gradient.stride(unit) == 1))
        and gamma in range(_LARGEST_GAMMA + 1)
    )


def _cells_of_task(batch: int, cells: int, threads: int) -> int:
    """Returns how many cells a task takes: as many as fit, but some tasks for every thread."""
    share = -(-batch * cells // (4 * threads)) if threads > 1 else cells
    return max(min(-(-share // 64) * 64, _MAX_CELLS), 64)


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    axes = ("batch", "class", "cell")
    return {f"{name}_{axis}_stride": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}
