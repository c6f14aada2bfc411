"""In what form the predictions of a call travel, and how their gradients are given back."""

from typing import Any, NamedTuple

import numpy as np

from lossd.gpu_memory import GpuArray
from lossd.sparse import unpack_sparse
from lossd.tensors import DTYPES, TensorError, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Payloads
from lossd_client._arrays import AnyArray, Array
from lossd_client._narrow import narrowed

_FLOAT64 = np.dtype(np.float64)


class Layout(NamedTuple):
    """Type and shape of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class WireForm:
    """The form of one call.

    Attributes:
        is_narrow: Whether predictions and gradients travel in a type of two bytes.

    Args:
        dtype: What predictions are sent in; None for their own type.
        gradient_dtype: What narrow gradients are given back in; None for the type of each one's input.
    """

    def __init__(
        self, dtype: np.dtype[Any] | None = None, gradient_dtype: np.dtype[Any] | None = None
    ) -> None:
        self.is_narrow = dtype is not None
        self._predictions: dict[str, Layout] = {}
        self._float64_items: set[str] = set()
        self._dtype = dtype
        self._gradient_dtype = gradient_dtype

    def prediction(self, path: str, array: AnyArray, *, keep: bool) -> AnyArray:
        """Returns a prediction as it is sent.

        Args:
            path: Where it stands in the request.
            array: The caller's.
            keep: Whether it is sent in its own type whatever the form.

        Raises:
            TensorError: The contract has no such type.
            InvalidInputError: A number is beyond the type that it would be sent in.
        """
        self.note(path, Layout(DTYPES[data_type_of(array.dtype)], array.shape))
        return array if keep or isinstance(array, GpuArray) else narrowed(path, array, self._dtype)

    def note(self, path: str, layout: Layout) -> None:
        """Takes in of what type and shape the caller's prediction at a path is."""
        self._predictions[path] = layout
        if layout.dtype == _FLOAT64:
            self._float64_items.add(path.rpartition(".")[0])

    def levels(self, path: str) -> int:
        """Returns of how many levels the input at a path is; 0 for one without levels."""
        level = 0
        while f"{path}[{level}]" in self._predictions:
            level += 1
        return level

    def loss(self, path: str, value: Array) -> Array:
        """Returns the value of the item at a path, float64 where the caller's predictions were."""
        if not self.is_narrow or path not in self._float64_items:
            return value
        return _read_only(value.astype(np.float64))

    def gradient(self, path: str, array: AnyArray) -> AnyArray:
        """Returns the gradient of the prediction at a path in the type that the caller wants."""
        dtype = self._wanted(path)
        if dtype is None or dtype == array.dtype or isinstance(array, GpuArray):
            return array
        with np.errstate(over="ignore"):
            return _read_only(array.astype(dtype))

    def sparse_gradient(self, path: str, sparse: pb.SparseTensor, payloads: Payloads) -> Array:
        """Returns the same of a sparse gradient, as a dense array.

        Raises:
            TensorError: It is not the gradient of that prediction.
        """
        if path not in self._predictions:
            raise TensorError("INVALID_TENSOR", f"{path} is no prediction: it has no sparse gradient")
        shape = self._predictions[path].shape
        return _read_only(unpack_sparse(sparse, shape, payloads, self._wanted(path)))

    def _wanted(self, path: str) -> np.dtype[Any] | None:
        if not self.is_narrow or path not in self._predictions:
            return None
        return self._gradient_dtype or self._predictions[path].dtype


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array
