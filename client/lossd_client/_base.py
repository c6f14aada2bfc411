"""What both clients are made of: their settings, their channel, and what they know of the server."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from lossd.headers import REQUEST_BYTES
from lossd_client._access import TLS, Access
from lossd_client._addresses import grpc_target
from lossd_client._calls import Call
from lossd_client._channel import ChannelKeeper
from lossd_client._hedging import LARGEST_BYTES
from lossd_client._lanes import LARGEST_BYTES as LARGEST_BYTES_ON_LANE
from lossd_client._lanes import METHODS, LaneKeeper
from lossd_client._retries import ONCE, Attempts, Deadline, RetryPolicy
from lossd_client._sharing import Sharing
from lossd_client._tracing import with_trace

C = TypeVar("C")

_DEFAULT_TARGET = "127.0.0.1:50051"

_LEAST_DECLARED_BYTES = 64 << 10
"""Smaller requests are there as soon as a word of their size; larger ones may so be refused
before they are sent."""


class ClientBase(Generic[C]):
    """A client without its methods; see `Client`."""

    _open: ClassVar["staticmethod[[Access], Any]"]
    _open_lane: ClassVar[Callable[..., Any]]
    _place: ClassVar["staticmethod[[], object]"]

    def __init__(
        self,
        target: str | Sequence[str] = _DEFAULT_TARGET,
        *,
        timeout: float | None = 60.0,
        channel: C | None = None,
        shared_memory: bool = True,
        retries: RetryPolicy | None = RetryPolicy(),  # noqa: B008  # it is immutable
        hedge_after: float | None = None,
        wait_for_ready: bool = False,
        tls: TLS | None = None,
        token: str | Path | None = None,
        insecure: bool = False,
    ) -> None:
        if hedge_after is not None and not hedge_after >= 0:
            raise ValueError(f"hedge_after is {hedge_after}, want at least 0")
        self._settings: dict[str, Any] = {
            "target": target if isinstance(target, str) else tuple(target),
            "timeout": timeout,
            "shared_memory": shared_memory,
            "retries": retries,
            "hedge_after": hedge_after,
            "wait_for_ready": wait_for_ready,
        }
        self._timeout = timeout
        self._retries = retries or ONCE
        self._hedge_after = hedge_after
        self._wait_for_ready = wait_for_ready
        self._max_message_bytes: int | None = None
        address = grpc_target(target)
        self._access = Access(address, tls=tls, token=token, insecure=insecure)
        self._channels: ChannelKeeper[C] = ChannelKeeper(
            channel, partial(self._open, self._access), self._place
        )
        # What holds for each call holds for calls alone: a token, a race, what the caller's channel does.
        makes_calls = channel is not None or hedge_after is not None or token is not None
        methods = () if makes_calls else METHODS
        self._lanes = {method: LaneKeeper[Any](method, self._open_lane) for method in methods}
        self._sharing = Sharing(address, wanted=shared_memory and channel is None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self._settings | self._access.settings_to_pickle())

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)(**self._settings, **self._access.settings())

    def _call_settings(self, size: int = 0) -> Mapping[str, Any]:
        """Returns what goes with a call, of a request of so many bytes; 0 where there are several."""
        metadata = self._access.metadata()
        if size >= _LEAST_DECLARED_BYTES:
            metadata = (*(metadata or ()), (REQUEST_BYTES, str(size)))
        return {"wait_for_ready": self._wait_for_ready, "metadata": metadata}

    def _deadline(self, timeout: float | None) -> Deadline:
        """Returns when a call is to be over that may take so many seconds; None for the client's."""
        return Deadline(self._timeout if timeout is None else timeout)

    def _attempts(self, timeout: float | None) -> Attempts:
        """Returns the attempts at a call that may take so many seconds."""
        return Attempts(self._retries, self._deadline(timeout))

    def _lane_keeper(self, call: Call[Any], size: int) -> LaneKeeper[Any] | None:
        """Returns what may have a lane for a call of so many bytes; None where it goes by itself."""
        keeper = self._lanes.get(call.method)
        if keeper is None or size >= LARGEST_BYTES_ON_LANE or with_trace(None) is not None:
            return None
        return keeper

    def _close_lanes(self, channel: C) -> None:
        for keeper in self._lanes.values():
            keeper.close(channel)

    def _hedge(self, call: Call[Any], data: bytes) -> float | None:
        """Returns after how many seconds without an answer a request is sent a second time, if it is."""
        if self._hedge_after is None or len(data) >= LARGEST_BYTES or call.storage.shares_memory:
            return None
        return self._hedge_after


def _restored(kind: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    return kind(**settings)
