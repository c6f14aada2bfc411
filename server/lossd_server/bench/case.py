"""What a case of the benchmark is: some paths to the same result."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Self

import torch
from torch import Tensor

from lossd_server.bench.child import Child
from lossd_server.bench.echo import EchoProcess
from lossd_server.engine import BufferPool

_MAX_IDLE_BYTES = 1 << 30
"""As of the engine."""

Outcome = Sequence[Any]
"""The value first, then gradients or further outputs: tensors, numpy arrays or numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """One path.

    Attributes:
        name: Its name in the table.
        call: Takes it once, and returns what came out; None where nothing can be compared.
        needs_bytes: Memory without which it is left out.
        gpu_call: What of it a GPU is told once all is read that the host wants to know; None for all of it.
    """

    name: str
    call: Callable[[], Outcome | None]
    needs_bytes: int = 0
    gpu_call: Callable[[], object] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Paths that are timed side by side.

    Attributes:
        paths: The paths.
        base: Name of the path that the others are faster than, or slower.
        oracle: Gives the exact result; None means that of `base`.
        is_local: Whether all is computed by this process on the device, and nothing else is timed.
    """

    paths: tuple[Path, ...]
    base: str
    oracle: Callable[[], Outcome] | None = None
    is_local: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseSpec:
    """A case before its inputs are made.

    Attributes:
        name: What it is asked for by.
        title: What is measured, in words.
        build: Makes inputs and paths.
        large: Whether a quick run leaves it out.
        needs_coco: Whether it takes objects from the workbench's annotation file.
        needs_gpu: Whether only a GPU is large enough for it.
    """

    name: str
    title: str
    build: "Callable[[Workbench], Case]"
    large: bool = False
    needs_coco: bool = False
    needs_gpu: bool = False


class Workbench:
    """What cases share; a context manager that ends it.

    Attributes:
        device: Where losses are evaluated.
        coco: A COCO annotation file, or None.
        resources: Closes what a case opens.
        buffers: Where gradients lie, as the engine's do.
    """

    def __init__(self, device: torch.device, coco: FilePath | None = None) -> None:
        self.device = device
        self.coco = coco
        self.resources = ExitStack()
        self.buffers = BufferPool(_MAX_IDLE_BYTES)
        self._child: Child | None = None
        self._echoes: EchoProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.resources.close()

    def child(self) -> Child:
        """Returns a server in a child process, which is started when first asked for."""
        if self._child is None:
            self._child = Child.start(str(self.device))
            self.resources.callback(self._child.stop)
        return self._child

    def echoes(self) -> EchoProcess:
        """Returns bare echo servers in a child process, which is started when first asked for."""
        if self._echoes is None:
            self._echoes = EchoProcess()
            self.resources.callback(self._echoes.stop)
        return self._echoes


def copy_path(tensors: Sequence[Tensor]) -> Path:
    """Returns the floor: a copy of the same bytes into memory that is there already."""
    targets = [torch.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)

    return Path(name="copy", call=copy)


def eager_call(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], *, gradients: bool, dtype: torch.dtype
) -> Callable[[], Outcome]:
    """Returns a call of `loss(*inputs)` under autograd, forward alone or forward and backward.

    Args:
        loss: Takes the inputs one by one.
        inputs: Differentiable tensors.
        gradients: Whether to go backward.
        dtype: What the inputs are taken in.
    """
    return partial(_eager, loss, [tensor.to(dtype) for tensor in inputs], gradients)


def _eager(loss: Callable[..., Tensor], inputs: Sequence[Tensor], gradients: bool) -> Outcome:  # noqa: FBT001
    with torch.set_grad_enabled(gradients):
        leaves = [tensor.detach().requires_grad_(gradients) for tensor in inputs]
        value = loss(*leaves)
        if not gradients:
            return [value]
        value.backward()  # type: ignore[no-untyped-call]
        # A level without objects is not part of some losses: its gradient is None where it is 0.
        return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]
