"""Remote losses as torch modules: the forward pass is one call, the backward pass none."""

import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lossd.gpu_memory import GpuArray
from lossd_client._arrays import AnyArray, Array
from lossd_client._config import LossConfig
from lossd_client._configs import CustomLoss
from lossd_client._fcos_configs import FCOSLoss
from lossd_client._results import LossResult
from lossd_client.client import Client

# Gradients are read-only arrays. Torch warns of such ones once a process: here, and unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))

_FCOS_TERMS = ("cls_loss", "reg_loss", "centerness_loss")
_WIDE_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class RemoteLoss(nn.Module):
    """A loss that a lossd server evaluates, in place of a local module.

    The gradients come back with the value, and `backward` only multiplies: a training step costs one
    round trip. They exist for predictions, not for targets, and cannot be differentiated again.

    Args:
        client: The client to call with.
        loss: Which loss, with its settings.
        wire_dtype: What predictions are sent in; see `Client.compute_loss`.
    """

    def __init__(self, client: Client, loss: LossConfig, *, wire_dtype: Any = None) -> None:
        super().__init__()
        self._client = client
        self._loss = loss
        self._wire_dtype = wire_dtype

    def forward(self, *arguments: Any) -> Tensor | dict[str, Tensor]:
        """Evaluates the loss; takes and returns what the local module does, on the same device.

        Raises:
            LossdError: The call failed; see `Client.compute_loss`.
        """
        leaves = self._differentiable(arguments)
        arguments = tuple(self._on_gpu(argument, leaves) for argument in arguments)
        wanted = [
            name
            for name, tensors in leaves.items()
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        ]
        dtypes = [tensor.dtype for tensors in leaves.values() for tensor in tensors]
        result = self._client.compute_loss(
            self._loss,
            *arguments,
            gradients=tuple(wanted),
            # A loss scale is multiplied in before half-precision gradients are rounded.
            gradient_dtype=_WIDE_DTYPES[reduce(torch.promote_types, dtypes, torch.float32)],
            wire_dtype=self._wire_dtype,
            component_gradients=not isinstance(self._loss, CustomLoss),
        )
        if isinstance(self._loss, FCOSLoss):
            return _fcos_losses(result, leaves)
        received = [(leaves[name][0], result.gradients[name]) for name in wanted]
        device = next(iter(leaves.values()))[0].device if leaves else torch.device("cpu")
        loss = torch.from_numpy(result.loss.copy()).to(device)
        return _attach(loss, received, result.kept_rows)

    def _on_gpu(self, argument: Any, leaves: Mapping[str, list[Tensor]]) -> Any:
        """Returns an argument with predictions in the GPU memory that the server shares, where it does."""
        if isinstance(argument, list | tuple):
            return [self._on_gpu(entry, leaves) for entry in argument]
        is_prediction = any(argument is tensor for tensors in leaves.values() for tensor in tensors)
        if not is_prediction or not argument.is_cuda or self._wire_dtype is not None:
            return argument
        gpu = argument.get_device()
        shared = self._client.allocate_on_gpu(argument.shape, _dtype_of(argument), gpu=gpu)
        if shared is None:
            return argument
        _tensor_of(shared).copy_(argument.detach())
        return shared

    def _differentiable(self, arguments: Sequence[Any]) -> dict[str, list[Tensor]]:
        """Returns the tensors, one or one a level, of each input that gradients can be asked for."""
        names: Sequence[str] = self._loss.differentiable
        values: Mapping[str, Any] = dict(zip(self._loss.inputs, arguments, strict=False))
        if isinstance(self._loss, CustomLoss):
            (values,) = arguments
            names = [n for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()]
        return {
            name: [values[name]] if isinstance(values[name], Tensor) else list(values[name]) for name in names
        }


def _fcos_losses(result: LossResult, leaves: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    like = leaves["cls_preds"][0]
    losses = {}
    for term, (name, tensors) in zip(_FCOS_TERMS, leaves.items(), strict=True):
        value = torch.tensor(
            result.components[term], dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )
        received = list(zip(tensors, result.gradients.get(name, ()), strict=False))
        losses[term] = _attach(value, received, None)
    weights = result.component_weights
    total = torch.stack([loss * weights[term] for term, loss in losses.items()]).sum()
    return {**losses, "loss": total, "total_loss": total}


def _attach(value: Tensor, received: Sequence[tuple[Tensor, AnyArray]], kept_rows: Array | None) -> Tensor:
    """Returns a value as a function of tensors whose gradients came with it."""
    if not received:
        return value
    inputs, gradients = zip(*received, strict=True)
    tensors = list(map(_tensor_of, gradients))
    attached: Tensor = _Received.apply(value, tensors, kept_rows, *inputs)  # type: ignore[no-untyped-call]
    return attached


def _tensor_of(array: AnyArray) -> Tensor:
    """Returns the very memory of an array as a tensor."""
    if not isinstance(array, GpuArray):
        return torch.from_numpy(array)  # read alone, so never copied
    device = torch.device("cuda", array.memory.ordinal)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.as_tensor(array.bits, device=device).view(torch.bfloat16)
    return torch.as_tensor(array, device=device)


def _dtype_of(tensor: Tensor) -> Any:
    """Returns numpy's type of a tensor's numbers."""
    is_bfloat16 = tensor.dtype == torch.bfloat16
    return ml_dtypes.bfloat16 if is_bfloat16 else torch.empty(0, dtype=tensor.dtype).numpy().dtype


class _Received(torch.autograd.Function):
    """Gives a value the gradients that came with it."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list[Tensor], kept_rows: Array | None, *inputs: Tensor
    ) -> Tensor:
        ctx.gradients = [
            gradient.to(tensor.device) for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.kept_rows = kept_rows
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            (gradient * _spread(upstream, gradient, ctx.kept_rows)).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return None, None, None, *scaled


def _spread(upstream: Tensor, gradient: Tensor, kept_rows: Array | None) -> Tensor:
    """Lays out the upstream gradient of a scalar, or of each row, to multiply an input's gradient."""
    if upstream.dim() == 0:
        return upstream
    if kept_rows is not None:  # rows of `[N, C]` or `[N, C, H, W]`, of which some are left out
        rows_shape = (gradient.shape[0], *gradient.shape[2:])
        rows = upstream.new_zeros(rows_shape).flatten()
        rows[torch.from_numpy(kept_rows.copy()).to(rows.device)] = upstream
        return rows.reshape(rows_shape).unsqueeze(1)
    if upstream.numel() == gradient.numel():
        return upstream.reshape(gradient.shape)
    return upstream.unsqueeze(-1)
