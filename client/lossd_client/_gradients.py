"""The gradients in a result."""

from collections.abc import Iterator, Mapping
from typing import Any

from lossd.tensors import TensorError
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd_client._arrays import AnyArray
from lossd_client._storage import Storage


class GradientArrays(Mapping[str, Any]):
    """Gradients by input name, until they are released."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays: Mapping[str, Any] | None = arrays

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return "GradientArrays(released)" if self._arrays is None else f"GradientArrays({self._arrays!r})"

    def release(self) -> None:
        """Lets go of the arrays; to ask for one from now on is an error."""
        self._arrays = None

    @property
    def _held(self) -> Mapping[str, Any]:
        if self._arrays is None:
            raise RuntimeError("the result was released: its gradients are gone")
        return self._arrays


def read_gradient(path: str, gradient: pb.Gradient, payloads: Payloads, storage: Storage) -> Any:
    """Returns the gradient of an input, an array or a list of them as the input was.

    Args:
        path: Where the input stood in the request.
        gradient: Its message, dense or sparse.
        payloads: Those of the answer.
        storage: What the request was packed into.

    Raises:
        TensorError: It means no array, or is not that of this input.
        ServerError: It lies where this call has no memory.
    """
    entries: list[tensor_pb2.Tensor | pb.SparseTensor] = [*gradient.tensors, *gradient.sparse]
    levels = storage.form.levels(path)
    if len(entries) != max(levels, 1):
        message = f"the gradient of {path} has {len(entries)} tensors, want {max(levels, 1)}"
        raise TensorError("INVALID_TENSOR", message)
    if not levels:
        return _read(path, entries[0], payloads, storage)
    return [_read(f"{path}[{i}]", entry, payloads, storage) for i, entry in enumerate(entries)]


def _read(
    path: str, entry: tensor_pb2.Tensor | pb.SparseTensor, payloads: Payloads, storage: Storage
) -> AnyArray:
    if isinstance(entry, pb.SparseTensor):
        return storage.form.sparse_gradient(path, entry, payloads)
    return storage.form.gradient(path, storage.read(entry, payloads))
