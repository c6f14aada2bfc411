"""The client for ordinary code."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from lossd_client._stream_threads import StreamOfThreads
from lossd_client._targets import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


class Client:
    """Calls a lossd server.

    Connects when first used, and anew in every process: an instance made before a fork, or pickled,
    works in the child. Threads may share one. Use it as a context manager, or call `close`.

    Args:
        target: Where the server listens: `host:port`, `unix:///path`, or any gRPC target.
        timeout: Seconds that a call may take unless it says otherwise; None for no end.
        channel: A channel of the caller's to use instead; never closed here, and not taken to
            another process.
        shared_memory: Whether tensors may go through memory that is shared with a server on this host,
            which happens by itself where the target is `unix:` and the server agrees.
        tls: Encryption, as the server has it; None for plain text.
        token: The bearer token, or the path of a file that holds it and is read for every call. A client
            that was given the token itself is not pickled, so that it is in no pickle.
        insecure: Whether a token may go over a network as plain text.

    Raises:
        ValueError: A token would go over a network as plain text.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout: float | None = 60.0,
        channel: grpc.Channel | None = None,
        shared_memory: bool = True,
        tls: TLS | None = None,
        token: str | Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._target = target
        self._access = Access(target, tls=tls, token=token, insecure=insecure)
        self._timeout = timeout
        self._given_channel = channel
        self._own_channel: grpc.Channel | None = None
        self._process: int | None = None
        self._max_message_bytes: int | None = None
        self._sharing = Sharing(target, wanted=shared_memory and channel is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self._target, self._settings() | self._access.settings_to_pickle())

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)(self._target, **self._settings(), **self._access.settings())

    def _settings(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "shared_memory": self._sharing.is_wanted}

    def compute_loss(
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
        """Evaluates a loss.

        Args:
            loss: Which loss, with its settings.
            *arguments: What its `forward` takes, in that order: numpy arrays, torch tensors, or
                anything that numpy reads.
            gradients: True for the gradients of all differentiable inputs, or the names of some.
            gradient_dtype: A numpy float dtype for the gradients; None means each input's own.
            wire_dtype: `bfloat16` or `float16`: predictions are sent rounded to it, and gradients come
                as bfloat16 and are widened here; all else is sent as it is. Half the bytes, for an
                error in the third digit. None sends everything in its own type.
            component_gradients: Gradients of the component that an input feeds, before that
                component's weight, instead of gradients of the loss.
            normalizer: What a mean is divided by in place of this item's own count.
            strict: Whether NaN and infinity in the inputs are refused, not just reported.
            timeout: Seconds; None means the client's.

        Raises:
            InvalidInputError: The server refuses the input; the error names field and value.
            NotFoundError: There is no such custom loss.
            TooLargeError: The input is larger than the server reads.
            UnavailableError: No server answers, after a few tries.
            DeadlineError: The timeout passed.
            ServerError: A fault of the server, or of a custom loss.
        """
        (result,) = self.compute_losses(
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

    def compute_losses(
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
        """Evaluates a loss on many inputs, each with shapes of its own, in one call.

        A batch is all or nothing, unless it is too large for one message: then it goes in several,
        one after the other, and an error in a later one comes after the earlier were evaluated.

        Args:
            loss: Which loss, with its settings.
            items: The arguments of each evaluation; see `compute_loss`.
            gradients: See `compute_loss`.
            gradient_dtype: See `compute_loss`.
            wire_dtype: See `compute_loss`.
            component_gradients: See `compute_loss`.
            normalizers: A normalizer, or None, for each item.
            strict: See `compute_loss`.
            timeout: Seconds for each message; None means the client's.

        Raises:
            LossdError: As for `compute_loss`; the field names the item.
        """
        items, storage = list(items), Storage(self._pool())
        while True:
            with storage:
                batch = loss_batch(
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
                calls = batch.calls(None if batch.is_small else self._message_limit())
                return [result for call in calls for result in self._call(call, timeout)]
            storage = storage.after_loss()

    def allocate(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Returns an array, its numbers not set, that a call can hand to the server without a copy.

        It lies in shared memory where the server takes any, and is an ordinary array elsewhere. Fill it,
        and pass it or a view of it to `compute_loss`; let it be until the call returns.

        Raises:
            UnavailableError: No server answers.
            DeadlineError: The timeout passed.
        """
        return allocated(self._pool(), shape, dtype)

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
        return self._call(call, timeout)

    def compute_loss_stream(
        self,
        loss: LossConfig,
        items: Iterable[Sequence[Any]],
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
    ) -> Iterator[Any]:
        """Evaluates a loss on one input after the other, many of them on their way at a time.

        Results come in the order of the items. Items are taken as there is room, the next when a result
        has been, and none before the first result is asked for. Leaving the loop early ends the call.

        Args:
            loss: Which loss, with its settings.
            items: The arguments of each evaluation; taken on a thread of their own. What they raise is
                raised here after the last result.
            gradients: See `compute_loss`.
            gradient_dtype: See `compute_loss`.
            wire_dtype: See `compute_loss`.
            component_gradients: See `compute_loss`.
            normalizer: See `compute_loss`; the same for all items.
            strict: See `compute_loss`.
            window: Most items that are sent and whose results have not been taken.
            return_exceptions: Whether the result of a refused item is its `LossdError`, and the stream
                goes on; otherwise that is raised in its turn and ends the stream.
            timeout: Seconds for the whole stream; None for no end.

        Raises:
            LossdError: As for `compute_loss`; the field counts items from the first: `items[17].focal`.
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
        made = StreamOfThreads(stream, items, self._message_limit, self._pool)
        return made.results(self._channel(), timeout, self._access.metadata())

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
            window: See `compute_loss_stream`, as for the next two.
            return_exceptions: Whether errors are results.
            timeout: Seconds for the whole stream.

        Raises:
            LossdError: As for `compute_loss_stream`.
        """
        stream = assign_stream(
            assigner,
            image_size=image_size,
            feature_sizes=feature_sizes,
            sparse=sparse,
            window=window,
            return_exceptions=return_exceptions,
        )
        made = StreamOfThreads(stream, batches, self._message_limit, lambda: None)
        return made.results(self._channel(), timeout, self._access.metadata())

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns what the server says of itself.

        Raises:
            UnavailableError: No server answers.
            DeadlineError: The timeout passed.
        """
        return self._call(info_call(), timeout)

    def close(self) -> None:
        """Closes the connection, if this client made one in this process; a later call makes another."""
        if self._own_channel is not None and self._process == os.getpid():
            self._own_channel.close()
        self._own_channel = None
        self._sharing.close()

    def _channel(self) -> grpc.Channel:
        if self._given_channel is not None:
            return self._given_channel
        if self._own_channel is None or self._process != os.getpid():
            # A parent's channel is dropped without a close: its threads are not here to answer.
            self._own_channel = self._access.open()
            self._process = os.getpid()
        return self._own_channel

    def _pool(self) -> "Pool | None":
        if self._sharing.is_possible and not self._sharing.is_known:
            self._sharing.learn(self.server_info())
        return self._sharing.pool()

    def _message_limit(self) -> int:
        if self._max_message_bytes is None:
            self._max_message_bytes = self.server_info().max_message_bytes
        return self._max_message_bytes

    def _call(self, call: Call[R], timeout: float | None) -> R:
        send: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel().unary_unary(call.path)
        try:
            answer = send(
                call.request.write(),
                timeout=self._timeout if timeout is None else timeout,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as error:
            raise call.error(error) from None
        return call.result(answer)


def _restore(kind: type[Client], target: str, settings: Mapping[str, Any]) -> Client:
    return kind(target, **settings)
