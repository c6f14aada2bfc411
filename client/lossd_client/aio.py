"""The client for asyncio: the same methods as `Client`, awaited."""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import grpc

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_client._channel import OPTIONS
from lossd_client._configs import FCOSAssigner, LossConfig
from lossd_client._errors import error_of_call
from lossd_client._requests import SMALL_BYTES, Gradients, assign_request, loss_request, split
from lossd_client._results import (
    DenseTargets,
    LossResult,
    ServerInfo,
    SparseTargets,
    read_loss_results,
    read_server_info,
    read_targets,
)


class AsyncClient:
    """Calls a lossd server from asyncio.

    Connects when first used, and anew in every process and event loop. Use it as an asynchronous
    context manager, or await `close`.

    Args:
        target: Where the server listens: `host:port`, `unix:///path`, or any gRPC target.
        timeout: Seconds that a call may take unless it says otherwise; None for no end.
        channel: A channel of the caller's to use instead; never closed here.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout: float | None = 60.0,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._given_channel = channel
        self._own_channel: grpc.aio.Channel | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._max_message_bytes: int | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def compute_loss(
        self,
        loss: LossConfig,
        *arguments: Any,
        gradients: Gradients = False,
        gradient_dtype: Any = None,
        component_gradients: bool = False,
        normalizer: float | None = None,
        strict: bool = False,
        timeout: float | None = None,
    ) -> LossResult:
        """Evaluates a loss; see `Client.compute_loss`."""
        (result,) = await self.compute_losses(
            loss,
            [arguments],
            gradients=gradients,
            gradient_dtype=gradient_dtype,
            component_gradients=component_gradients,
            normalizers=[normalizer],
            strict=strict,
            timeout=timeout,
        )
        return result

    async def compute_losses(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]],
        *,
        gradients: Gradients = False,
        gradient_dtype: Any = None,
        component_gradients: bool = False,
        normalizers: Sequence[float | None] | None = None,
        strict: bool = False,
        timeout: float | None = None,
    ) -> list[LossResult]:
        """Evaluates a loss on many inputs in one call; see `Client.compute_losses`."""
        request = loss_request(
            loss,
            items,
            gradients=gradients,
            gradient_dtype=gradient_dtype,
            component_gradients=component_gradients,
            normalizers=normalizers,
            strict=strict,
        )
        if request.ByteSize() <= SMALL_BYTES:
            parts = [(0, request)]
        else:
            parts = list(split(request, await self._message_limit()))
        call = self._stub().ComputeLoss
        responses = [await self._call(call, part, timeout, first_item=first) for first, part in parts]
        return read_loss_results(loss.kind, responses)

    async def assign_targets(
        self,
        assigner: FCOSAssigner,
        ground_truth: Sequence[Mapping[str, Any]],
        *,
        image_size: tuple[int, int] | None = None,
        feature_sizes: Sequence[tuple[int, int]] | None = None,
        sparse: bool = False,
        timeout: float | None = None,
    ) -> DenseTargets | SparseTargets:
        """Assigns targets; see `Client.assign_targets`."""
        request = assign_request(
            assigner, ground_truth, image_size=image_size, feature_sizes=feature_sizes, sparse=sparse
        )
        return read_targets(await self._call(self._stub().AssignTargets, request, timeout))

    async def server_info(
        self,
        *,
        timeout: float | None = None,
    ) -> ServerInfo:
        """Returns what the server says of itself; see `Client.server_info`."""
        request = pb.GetServerInfoRequest()
        return read_server_info(await self._call(self._stub().GetServerInfo, request, timeout))

    async def close(self) -> None:
        """Closes the connection, if this client made one here; a later call makes another."""
        if self._own_channel is not None and self._home == _home():
            await self._own_channel.close()
        self._own_channel = None

    def _stub(self) -> Any:
        if self._given_channel is not None:
            return LossServiceStub(self._given_channel)
        if self._own_channel is None or self._home != _home():
            self._own_channel = grpc.aio.insecure_channel(self._target, options=OPTIONS)
            self._home = _home()
        return LossServiceStub(self._own_channel)

    async def _message_limit(self) -> int:
        if self._max_message_bytes is None:
            self._max_message_bytes = (await self.server_info()).max_message_bytes
        return self._max_message_bytes

    async def _call(
        self, call: Callable[..., Any], request: Any, timeout: float | None, *, first_item: int = 0
    ) -> Any:
        try:
            return await call(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise error_of_call(error, first_item=first_item) from None


def _home() -> tuple[int, asyncio.AbstractEventLoop]:
    """Where a channel may be used: this process and this loop."""
    return os.getpid(), asyncio.get_running_loop()
