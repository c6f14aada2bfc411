"""The client for asyncio: the same methods as `Client`, awaited."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc
import numpy as np

from lossd.gpu_memory import GpuArray
from lossd.wire import Buffer
from lossd_client import _chunks
from lossd_client._access import Access
from lossd_client._arrays import Array
from lossd_client._base import ClientBase
from lossd_client._calls import Call, info_call
from lossd_client._config import LossConfig
from lossd_client._errors import LossdError
from lossd_client._fcos_configs import FCOSAssigner
from lossd_client._hedging import send_async
from lossd_client._lane_tasks import LaneOfTasks
from lossd_client._loss_requests import loss_batch, loss_stream, usual_call
from lossd_client._options import EvaluationOptions, LossOptions
from lossd_client._results import LossResult, ServerInfo
from lossd_client._retries import Attempts, Deadline
from lossd_client._sharing import allocated, allocated_on_gpu
from lossd_client._storage import MemoryInUseError, Storage
from lossd_client._stream_tasks import StreamOfTasks
from lossd_client._streams import WINDOW, Stream
from lossd_client._target_requests import assign_call, assign_stream
from lossd_client._targets import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


def _home() -> tuple[int, asyncio.AbstractEventLoop]:
    """Where a channel may be used: this process and this loop."""
    return os.getpid(), asyncio.get_running_loop()


class AsyncClient(ClientBase[grpc.aio.Channel]):
    """Calls a lossd server, or one of several, from asyncio.

    Connects when first used, and anew in every process and event loop. Use it as an asynchronous
    context manager, or await `close`.

    Args:
        target: As for `Client`, like all that follow.
        timeout: Seconds that a call may take unless it says otherwise.
        channel: A channel of the caller's to use instead; never closed here.
        shared_memory: Whether tensors may go through shared memory.
        retries: How often, and after what pauses, to ask again where nobody answers.
        hedge_after: Seconds after which a small call is made again.
        wait_for_ready: Whether a call waits while there is no connection.
        tls: Encryption.
        token: The bearer token, or the path of a file with it.
        insecure: Whether it may go over a network as plain text.
    """

    _open = staticmethod(Access.open_async)
    _open_lane = LaneOfTasks
    _place = staticmethod(_home)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def compute_loss(
        self,
        loss: LossConfig,
        *arguments: Any,
        normalizer: float | None = None,
        timeout: float | None = None,
        **options: Unpack[LossOptions],
    ) -> LossResult:
        """Evaluates a loss; see `Client.compute_loss`. Arguments are not to change until it has ended."""
        (result,) = await self.compute_losses(
            loss, [arguments], normalizers=[normalizer], timeout=timeout, **options
        )
        return result

    async def compute_losses(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]],
        *,
        normalizers: Sequence[float | None] | None = None,
        timeout: float | None = None,
        **options: Unpack[LossOptions],
    ) -> list[LossResult]:
        """Evaluates a loss on many inputs in one call; see `Client.compute_losses`.

        Arguments are not to change until it has ended.
        """
        evaluation, attempts = EvaluationOptions(**options), self._attempts(timeout)
        items, pool = list(items), await self._pool(attempts.deadline)
        usual = usual_call(loss, items, evaluation, normalizers, shares_memory=pool is not None)
        if usual is not None:
            return await self._call(usual.call, attempts, usual.request)
        storage = Storage(pool)
        while True:
            with storage:
                pack = partial(loss_batch, loss, items, evaluation, normalizers, storage)
                # Passing memory waits for the server, and tensors are copied: not on the loop's time.
                batch = pack() if pool is None else await asyncio.to_thread(pack)
                limit = None if batch.is_small else await self._message_limit(attempts.deadline)
                calls = batch.calls(limit)
                return [result for call in calls for result in await self._call(call, attempts)]
            storage = await asyncio.to_thread(storage.again)

    async def allocate(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Returns an array that a call can hand to the server without a copy; see `Client.allocate`."""
        return await asyncio.to_thread(allocated, await self._pool(self._deadline(None)), shape, dtype)

    async def allocate_on_gpu(
        self, shape: int | Sequence[int], dtype: Any = np.float32, *, gpu: int | None = None
    ) -> GpuArray | None:
        """Returns an array on the server's GPU, None where there is none; see `Client.allocate_on_gpu`."""
        pool = await self._pool(self._deadline(None))
        return await asyncio.to_thread(allocated_on_gpu, pool, shape, dtype, gpu)

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
        return await self._call(call, self._attempts(timeout))

    def compute_loss_stream(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]] | AsyncIterable[Sequence[Any]],
        *,
        normalizer: float | None = None,
        window: int = WINDOW,
        return_exceptions: bool = False,
        timeout: float | None = None,
        **options: Unpack[LossOptions],
    ) -> AsyncIterator[Any]:
        """Evaluates a loss on one input after the other; see `Client.compute_loss_stream`.

        Items may come from an ordinary iterable or an asynchronous one, in a task of their own. Only
        `contextlib.aclosing` ends the call at once when the loop is left early.
        """
        evaluation = EvaluationOptions(**options)
        stream = loss_stream(loss, evaluation, normalizer, window=window, return_exceptions=return_exceptions)
        return self._stream(stream, items, timeout, shares_memory=True)

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
        return self._stream(stream, batches, timeout, shares_memory=False)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns what the server says of itself; see `Client.server_info`."""
        return await self._call(info_call(), self._attempts(timeout))

    async def close(self) -> None:
        """Closes the connection, if this client made one here; a later call makes another."""
        if channel := self._channels.take():
            self._close_lanes(channel)
            await channel.close()
        self._sharing.close()

    async def _pool(self, deadline: Deadline) -> "Pool | None":
        if self._sharing.is_possible and not self._sharing.is_known:
            self._sharing.learn(await self._call(info_call(), Attempts(self._retries, deadline)))
        return self._sharing.pool()

    async def _message_limit(self, deadline: Deadline) -> int:
        if self._max_message_bytes is None:
            info = await self._call(info_call(), Attempts(self._retries, deadline))
            self._max_message_bytes = info.max_message_bytes
        return self._max_message_bytes

    async def _call(self, call: Call[R], attempts: Attempts, usual_request: bytes | None = None) -> R:
        request = usual_request or call.outgoing()
        while True:
            try:
                return await self._result(call, request, attempts.deadline)
            except LossdError as error:
                pause, is_in_use = attempts.pause_after(error), False
            except grpc.RpcError as error:
                if not isinstance(request, bytes) and _chunks.goes_better_whole(error):
                    request = await asyncio.to_thread(b"".join, request)
                    continue
                pause, is_in_use = attempts.pause_after(call.error(error)), call.leaves_memory_in_use(error)
            await asyncio.sleep(pause)
            if is_in_use:
                raise MemoryInUseError

    async def _result(self, call: Call[R], request: bytes | list[Buffer], deadline: Deadline) -> R:
        """Returns what comes of one attempt at a call."""
        result: R | None = None
        if isinstance(request, bytes):
            result = await self._on_lane(call, request, deadline)
        return call.result(await self._send(call, request, deadline)) if result is None else result

    async def _on_lane(self, call: Call[R], request: bytes, deadline: Deadline) -> R | None:
        """Returns the result of a small call that closely follows others; None where it is to be sent."""
        keeper = self._lane_keeper(call, len(request))
        lane: LaneOfTasks | None = None if keeper is None else keeper.take(self._channels.get())
        if keeper is None or lane is None:
            return None
        try:
            result = await lane.ask(call, request, deadline)
        finally:
            keeper.give_back(lane)
        if result is None and lane.is_sent and call.storage.is_written_to:
            raise MemoryInUseError
        return result

    async def _send(self, call: Call[Any], request: bytes | list[Buffer], deadline: Deadline) -> Buffer:
        if isinstance(request, bytes):
            method, settings = self._channels.method(call.path), self._call_settings(len(request))
            return await send_async(method, request, self._hedge(call, request), deadline, **settings)
        method = self._channels.stream_method(call.path_in_chunks)
        settings = self._call_settings(sum(map(len, request)))
        return await _chunks.send_async(method, request, deadline, **settings)

    async def _stream(
        self,
        stream: Stream[R],
        items: Iterable[Any] | AsyncIterable[Any],
        timeout: float | None,
        *,
        shares_memory: bool,
    ) -> AsyncIterator[R | LossdError]:
        attempts = Attempts(self._retries, Deadline(timeout))
        limit = partial(self._message_limit, attempts.deadline)
        pool = partial(self._pool, attempts.deadline) if shares_memory else _no_pool
        made = StreamOfTasks(stream, items, attempts, limit, pool)
        async with aclosing(made.results(self._channels.get(), self._call_settings)) as results:
            async for result in results:
                yield result


async def _no_pool() -> None:
    """Returns the shared memory of calls whose tensors are not worth it."""
