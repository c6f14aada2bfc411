"""The client for ordinary code."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from lossd_client._hedging import send
from lossd_client._lane_threads import LaneOfThreads
from lossd_client._loss_requests import loss_batch, loss_stream, usual_call
from lossd_client._options import EvaluationOptions, LossOptions
from lossd_client._results import LossResult, ServerInfo
from lossd_client._retries import Attempts, Deadline
from lossd_client._sharing import allocated, allocated_on_gpu
from lossd_client._storage import MemoryInUseError, Storage
from lossd_client._stream_threads import StreamOfThreads
from lossd_client._streams import WINDOW, Stream
from lossd_client._target_requests import assign_call, assign_stream
from lossd_client._targets import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


class Client(ClientBase[grpc.Channel]):
    """Calls a lossd server, or one of several.

    Connects when first used, and anew in every process: an instance made before a fork, or pickled,
    works in the child. Threads may share one. Use it as a context manager, or call `close`.

    Small calls that closely follow one another go on a stream that stays open for them, for seconds at most.

    Args:
        target: Where the server listens: `host:port`, `unix:///path`, or any gRPC target. Calls go round
            all addresses of one: those of a name (`dns:///name:port`), or several as `ip:port,ip:port`
            or a sequence of such.
        timeout: Seconds that a call may take unless it says otherwise, with all that it takes: attempts
            and the pauses between them, and all messages of a batch; None for no end.
        channel: A channel of the caller's to use instead; never closed here, and not taken to
            another process.
        shared_memory: Whether tensors may go through memory that is shared with a server on this host,
            as happens by itself where the target is `unix:` and the server agrees.
        retries: How often, and after what pauses, to ask again where nobody answers; None for never.
        hedge_after: Seconds after which a call of less than 256 KiB is made again where it has no answer
            yet, and once more after as long: the first good one counts. It is for several servers. None for
            never.
        wait_for_ready: Whether a call waits for a connection to a server instead of failing without.
        tls: Encryption, as the server has it; None for plain text.
        token: The bearer token, or the path of a file that holds it and is read for every call. A client
            that was given the token itself is not pickled, so that it is in no pickle.
        insecure: Whether a token may go over a network as plain text.

    Raises:
        ValueError: The target or a number is none, or a token would go over a network as plain text.
    """

    _open = staticmethod(Access.open)
    _open_lane = LaneOfThreads
    _place = staticmethod(os.getpid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def compute_loss(
        self,
        loss: LossConfig,
        *arguments: Any,
        normalizer: float | None = None,
        timeout: float | None = None,
        **options: Unpack[LossOptions],
    ) -> LossResult:
        """Evaluates a loss.

        Args:
            loss: Which loss, with its settings.
            *arguments: What its `forward` takes, in that order: numpy arrays, torch tensors, or
                anything that numpy reads.
            normalizer: What a mean is divided by in place of this item's own count.
            timeout: Seconds; None means the client's.
            **options: As follows.
            gradients: True for the gradients of all differentiable inputs, or the names of some.
            gradient_dtype: A numpy float dtype for the gradients; None means each input's own.
            wire_dtype: `bfloat16` or `float16`: predictions are sent rounded to it, and gradients come
                as bfloat16 and are widened here; all else is sent as it is. Half the bytes, for an
                error in the third digit. None sends everything in its own type.
            component_gradients: Gradients of the component that an input feeds, before that
                component's weight, instead of gradients of the loss.
            strict: Whether NaN and infinity in the inputs are refused, not just reported.

        Raises:
            InvalidInputError: The server refuses the input; the error names field and value.
            NotFoundError: There is no such custom loss.
            TooLargeError: The input is larger than the server reads.
            UnavailableError: No server answers, after a few tries.
            DeadlineError: The timeout passed.
            ServerError: A fault of the server, or of a custom loss.
        """
        (result,) = self.compute_losses(
            loss, [arguments], normalizers=[normalizer], timeout=timeout, **options
        )
        return result

    def compute_losses(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]],
        *,
        normalizers: Sequence[float | None] | None = None,
        timeout: float | None = None,
        **options: Unpack[LossOptions],
    ) -> list[LossResult]:
        """Evaluates a loss on many inputs, each with shapes of its own, in one call.

        A batch is all or nothing, unless it is too large for one message: then it goes in several,
        one after the other, and an error in a later one comes after the earlier were evaluated.

        Args:
            loss: Which loss, with its settings.
            items: The arguments of each evaluation; see `compute_loss`.
            normalizers: A normalizer, or None, for each item.
            timeout: Seconds for all of it; None means the client's.
            **options: See `compute_loss`.

        Raises:
            LossdError: As for `compute_loss`; the field names the item.
        """
        evaluation, attempts = EvaluationOptions(**options), self._attempts(timeout)
        items, pool = list(items), self._pool(attempts.deadline)
        usual = usual_call(loss, items, evaluation, normalizers, shares_memory=pool is not None)
        if usual is not None:
            return self._call(usual.call, attempts, usual.request)
        storage = Storage(pool)
        while True:
            with storage:
                batch = loss_batch(loss, items, evaluation, normalizers, storage)
                calls = batch.calls(None if batch.is_small else self._message_limit(attempts.deadline))
                return [result for call in calls for result in self._call(call, attempts)]
            storage = storage.again()

    def allocate(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Returns an array, its numbers not set, that a call can hand to the server without a copy.

        It lies in shared memory where the server takes any, and is an ordinary array elsewhere. Fill it,
        and pass it or a view of it to `compute_loss`; let it be until the call returns.

        Raises:
            UnavailableError: No server answers.
            DeadlineError: The timeout passed.
        """
        return allocated(self._pool(self._deadline(None)), shape, dtype)

    def allocate_on_gpu(
        self, shape: int | Sequence[int], dtype: Any = np.float32, *, gpu: int | None = None
    ) -> GpuArray | None:
        """Returns an array on the server's GPU, which a call hands over without a copy.

        None where the server and this process have no GPU in common, or share no memory, or the GPU is
        not the one of the number `gpu`, if one is given. Fill it by
        whatever knows `__cuda_array_interface__`, as by `torch.as_tensor(array, device="cuda")`, and pass
        it to `compute_loss` as a prediction: its gradient comes as such an array too. A call waits until
        the GPU has done what this process told it before, and returns when the gradients are there. Of
        an array that the server has not, or no longer, and with a `wire_dtype`, a copy is sent.

        Raises:
            UnavailableError: No server answers.
            DeadlineError: The timeout passed.
        """
        return allocated_on_gpu(self._pool(self._deadline(None)), shape, dtype, gpu)

    def assign_targets(
        self,
        assigner: FCOSAssigner,
        ground_truth: Sequence[Mapping[str, Any]],
        *,
        image_size: tuple[int, int] | None = None,
        feature_sizes: Sequence[tuple[int, int]] | None = None,
        sparse: bool = False,
        timeout: float | None = None,
    ) -> DenseTargets | SparseTargets:
        """Assigns the locations of a feature pyramid to the objects of a batch of images.

        Args:
            assigner: The rules.
            ground_truth: For each image a mapping with `boxes` `[N, 4]` and `labels` `[N]`, and
                optionally `iscrowd` `[N]`.
            image_size: Height and width of the images, pixels; or give `feature_sizes`.
            feature_sizes: Height and width of each level, locations.
            sparse: Whether to return the positive locations alone.
            timeout: Seconds; None means the client's.

        Raises:
            LossdError: As for `compute_loss`.
        """
        call = assign_call(
            assigner, ground_truth, image_size=image_size, feature_sizes=feature_sizes, sparse=sparse
        )
        return self._call(call, self._attempts(timeout))

    def compute_loss_stream(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]],
        *,
        normalizer: float | None = None,
        window: int = WINDOW,
        return_exceptions: bool = False,
        timeout: float | None = None,
        **options: Unpack[LossOptions],
    ) -> Iterator[Any]:
        """Evaluates a loss on one input after the other, many of them on their way at a time.

        Results come in the order of the items. Items are taken as there is room, the next when a result
        has been, and none before the first result is asked for. Leaving the loop early ends the call.
        Where a server goes away, or turns an item away for the time being, what has no answer is sent
        again, to another one or when it is back; each answer starts the count of attempts anew.

        Args:
            loss: Which loss, with its settings.
            items: The arguments of each evaluation; taken on a thread of their own. What they raise is
                raised here after the last result.
            normalizer: See `compute_loss`; the same for all items.
            window: Most items that are sent and whose results have not been taken.
            return_exceptions: Whether the result of a refused item is its `LossdError`, and the stream
                goes on; otherwise that is raised in its turn and ends the stream.
            timeout: Seconds for the whole stream; None for no end.
            **options: See `compute_loss`.

        Raises:
            LossdError: As for `compute_loss`; the field counts items from the first: `items[17].focal`.
        """
        evaluation = EvaluationOptions(**options)
        stream = loss_stream(loss, evaluation, normalizer, window=window, return_exceptions=return_exceptions)
        return self._stream(stream, items, timeout, shares_memory=True)

    def assign_targets_stream(
        self,
        assigner: FCOSAssigner,
        batches: Iterable[Sequence[Mapping[str, Any]]],
        *,
        image_size: tuple[int, int] | None = None,
        feature_sizes: Sequence[tuple[int, int]] | None = None,
        sparse: bool = False,
        window: int = WINDOW,
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """Assigns targets to one batch of images after the other; a stream like `compute_loss_stream`.

        Args:
            assigner: The rules.
            batches: The ground truth of each batch; see `assign_targets`.
            image_size: See `assign_targets`; the same for all, as the next two.
            feature_sizes: See `assign_targets`.
            sparse: See `assign_targets`.
            window: See `compute_loss_stream`, as for the next two, and for errors.
            return_exceptions: Whether errors are results.
            timeout: Seconds for the whole stream.
        """
        stream = assign_stream(
            assigner,
            image_size=image_size,
            feature_sizes=feature_sizes,
            sparse=sparse,
            window=window,
            return_exceptions=return_exceptions,
        )
        return self._stream(stream, batches, timeout, shares_memory=False)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns what the server says of itself; raises what `compute_loss` does where none answers."""
        return self._call(info_call(), self._attempts(timeout))

    def close(self) -> None:
        """Closes the connection, if this client made one in this process; a later call makes another."""
        if channel := self._channels.take():
            self._close_lanes(channel)
            channel.close()
        self._sharing.close()

    def _pool(self, deadline: Deadline) -> "Pool | None":
        if self._sharing.is_possible and not self._sharing.is_known:
            self._sharing.learn(self._call(info_call(), Attempts(self._retries, deadline)))
        return self._sharing.pool()

    def _message_limit(self, deadline: Deadline) -> int:
        if self._max_message_bytes is None:
            info = self._call(info_call(), Attempts(self._retries, deadline))
            self._max_message_bytes = info.max_message_bytes
        return self._max_message_bytes

    def _call(self, call: Call[R], attempts: Attempts, usual_request: bytes | None = None) -> R:
        request = usual_request or call.outgoing()
        while True:
            try:
                return self._result(call, request, attempts.deadline)
            except LossdError as error:
                pause, is_in_use = attempts.pause_after(error), False
            except grpc.RpcError as error:
                if not isinstance(request, bytes) and _chunks.goes_better_whole(error):
                    request = b"".join(request)
                    continue
                pause, is_in_use = attempts.pause_after(call.error(error)), call.leaves_memory_in_use(error)
            time.sleep(pause)
            if is_in_use:
                raise MemoryInUseError

    def _result(self, call: Call[R], request: bytes | list[Buffer], deadline: Deadline) -> R:
        """Returns what comes of one attempt at a call."""
        result = self._on_lane(call, request, deadline) if isinstance(request, bytes) else None
        return call.result(self._send(call, request, deadline)) if result is None else result

    def _on_lane(self, call: Call[R], request: bytes, deadline: Deadline) -> R | None:
        """Returns the result of a small call that closely follows others; None where it is to be sent."""
        keeper = self._lane_keeper(call, len(request))
        lane: LaneOfThreads | None = None if keeper is None else keeper.take(self._channels.get())
        if keeper is None or lane is None:
            return None
        try:
            result = lane.ask(call, request, deadline)
        finally:
            keeper.give_back(lane)
        if result is None and lane.is_sent and call.storage.is_written_to:
            raise MemoryInUseError
        return result

    def _send(self, call: Call[Any], request: bytes | list[Buffer], deadline: Deadline) -> Buffer:
        if isinstance(request, bytes):
            method, settings = self._channels.method(call.path), self._call_settings(len(request))
            return send(method, request, self._hedge(call, request), deadline, **settings)
        method = self._channels.stream_method(call.path_in_chunks)
        settings = self._call_settings(sum(map(len, request)))
        return _chunks.send(method, request, deadline, **settings)

    def _stream(
        self, stream: Stream[R], items: Iterable[Any], timeout: float | None, *, shares_memory: bool
    ) -> Iterator[R | LossdError]:
        attempts = Attempts(self._retries, Deadline(timeout))
        limit = partial(self._message_limit, attempts.deadline)
        pool = partial(self._pool, attempts.deadline) if shares_memory else lambda: None
        made = StreamOfThreads(stream, items, attempts, limit, pool)
        yield from made.results(self._channels.get(), self._call_settings)
