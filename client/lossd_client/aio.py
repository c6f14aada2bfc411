"""The client for asyncio: the same methods as `Client`, awaited."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import numpy as np

from lossd_client._access import TLS, Access
from lossd_client._arrays import Array
from lossd_client._calls import Call
from lossd_client._configs import FCOSAssigner, LossConfig
from lossd_client._requests import (
    WINDOW,
    Gradients,
    assign_call,
    assign_stream,
    info_call,
    loss_batch,
    loss_stream,
)
from lossd_client._results import LossResult, ServerInfo
from lossd_client._sharing import Sharing, allocated
from lossd_client._storage import Storage
from lossd_client._stream_tasks import StreamOfTasks
from lossd_client._targets import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


class AsyncClient:
    """Calls a lossd server from asyncio.

    Connects when first used, and anew in every process and event loop. Use it as an asynchronous
    context manager, or await `close`.

    Args:
        target: Where the server listens: `host:port`, `unix:///path`, or any gRPC target.
        timeout: Seconds that a call may take unless it says otherwise; None for no end.
        channel: A channel of the caller's to use instead; never closed here.
        shared_memory: Whether tensors may go through shared memory; see `Client`.
        tls: See `Client`, as for the next two.
        token: The bearer token, or the path of a file with it.
        insecure: Whether it may go over a network as plain text.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout: float | None = 60.0,
        channel: grpc.aio.Channel | None = None,
        shared_memory: bool = True,
        tls: TLS | None = None,
        token: str | Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._target = target
        self._access = Access(target, tls=tls, token=token, insecure=insecure)
        self._timeout = timeout
        self._given_channel = channel
        self._own_channel: grpc.aio.Channel | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._max_message_bytes: int | None = None
        self._sharing = Sharing(target, wanted=shared_memory and channel is None)

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
        wire_dtype: Any = None,
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
            wire_dtype=wire_dtype,
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
        wire_dtype: Any = None,
        component_gradients: bool = False,
        normalizers: Sequence[float | None] | None = None,
        strict: bool = False,
        timeout: float | None = None,
    ) -> list[LossResult]:
        """Evaluates a loss on many inputs in one call; see `Client.compute_losses`."""
        items, pool = list(items), await self._pool()
        storage = Storage(pool)
        while True:
            with storage:
                pack = partial(
                    loss_batch,
                    loss,
                    items,
                    gradients=gradients,
                    gradient_dtype=gradient_dtype,
                    wire_dtype=wire_dtype,
                    component_gradients=component_gradients,
                    normalizers=normalizers,
                    strict=strict,
                    storage=storage,
                )
                # Passing memory waits for the server, and tensors are copied: not on the loop's time.
                batch = pack() if pool is None else await asyncio.to_thread(pack)
                calls = batch.calls(None if batch.is_small else await self._message_limit())
                return [result for call in calls for result in await self._call(call, timeout)]
            storage = await asyncio.to_thread(storage.after_loss)

    async def allocate(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Returns an array that a call can hand to the server without a copy; see `Client.allocate`."""
        return await asyncio.to_thread(allocated, await self._pool(), shape, dtype)

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
        call = assign_call(
            assigner, ground_truth, image_size=image_size, feature_sizes=feature_sizes, sparse=sparse
        )
        return await self._call(call, timeout)

    def compute_loss_stream(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]] | AsyncIterable[Sequence[Any]],
        *,
        gradients: Gradients = False,
        gradient_dtype: Any = None,
        wire_dtype: Any = None,
        component_gradients: bool = False,
        normalizer: float | None = None,
        strict: bool = False,
        window: int = WINDOW,
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> AsyncIterator[Any]:
        """Evaluates a loss on one input after the other; see `Client.compute_loss_stream`.

        Items may come from an ordinary iterable or an asynchronous one, in a task of their own. Only
        `contextlib.aclosing` ends the call at once when the loop is left early.
        """
        stream = loss_stream(
            loss,
            gradients=gradients,
            gradient_dtype=gradient_dtype,
            wire_dtype=wire_dtype,
            component_gradients=component_gradients,
            normalizer=normalizer,
            strict=strict,
            window=window,
            return_exceptions=return_exceptions,
        )
        made = StreamOfTasks(stream, items, self._message_limit, self._pool)
        return made.results(self._channel(), timeout, self._access.metadata())

    def assign_targets_stream(
        self,
        assigner: FCOSAssigner,
        batches: Iterable[Sequence[Mapping[str, Any]]] | AsyncIterable[Sequence[Mapping[str, Any]]],
        *,
        image_size: tuple[int, int] | None = None,
        feature_sizes: Sequence[tuple[int, int]] | None = None,
        sparse: bool = False,
        window: int = WINDOW,
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> AsyncIterator[Any]:
        """Assigns targets to one batch of images after the other; see `compute_loss_stream`."""
        stream = assign_stream(
            assigner,
            image_size=image_size,
            feature_sizes=feature_sizes,
            sparse=sparse,
            window=window,
            return_exceptions=return_exceptions,
        )
        made = StreamOfTasks(stream, batches, self._message_limit, _no_pool)
        return made.results(self._channel(), timeout, self._access.metadata())

    async def server_info(
        self,
        *,
        timeout: float | None = None,
    ) -> ServerInfo:
        """Returns what the server says of itself; see `Client.server_info`."""
        return await self._call(info_call(), timeout)

    async def close(self) -> None:
        """Closes the connection, if this client made one here; a later call makes another."""
        if self._own_channel is not None and self._home == _home():
            await self._own_channel.close()
        self._own_channel = None
        self._sharing.close()

    def _channel(self) -> grpc.aio.Channel:
        if self._given_channel is not None:
            return self._given_channel
        if self._own_channel is None or self._home != _home():
            self._own_channel = self._access.open_async()
            self._home = _home()
        return self._own_channel

    async def _pool(self) -> "Pool | None":
        if self._sharing.is_possible and not self._sharing.is_known:
            self._sharing.learn(await self.server_info())
        return self._sharing.pool()

    async def _message_limit(self) -> int:
        if self._max_message_bytes is None:
            self._max_message_bytes = (await self.server_info()).max_message_bytes
        return self._max_message_bytes

    async def _call(self, call: Call[R], timeout: float | None) -> R:
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel().unary_unary(call.path)
        try:
            answer = await send(
                call.request.write(),
                timeout=self._timeout if timeout is None else timeout,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as error:
            raise call.error(error) from None
        return call.result(answer)


def _home() -> tuple[int, asyncio.AbstractEventLoop]:
    """Where a channel may be used: this process and this loop."""
    return os.getpid(), asyncio.get_running_loop()


async def _no_pool() -> None:
    """Returns the shared memory of calls whose tensors are not worth it."""
