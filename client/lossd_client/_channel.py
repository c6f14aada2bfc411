"""The channel of a client: its caller's, or its own, made where and when it is first wanted."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

C = TypeVar("C")


class ChannelKeeper(Generic[C]):
    """Holds the channel of a client, one in every place where it is used.

    Args:
        given: A channel of the caller's, which is used everywhere and never closed.
        make: Makes one where none is given.
        place: Says where this is. What was made elsewhere, such as in the process that forked this
            one, is dropped without a close: its threads are not here to answer.
    """

    def __init__(self, given: C | None, make: Callable[[], C], place: Callable[[], object]) -> None:
        self._given = given
        self._make = make
        self._place = place
        self._made: C | None = None
        self._home: object = None
        self._methods: dict[str, tuple[C, Any]] = {}

    def get(self) -> C:
        """Returns the channel to use here."""
        if self._given is not None:
            return self._given
        if self._made is None or self._home != self._place():
            self._made, self._home = self._make(), self._place()
        return self._made

    def method(self, path: str) -> Any:
        """Returns a unary method of the channel to use here; making one takes as long as a small message."""
        channel = self.get()
        known, method = self._methods.get(path, (None, None))
        if known is not channel:
            method = channel.unary_unary(path)  # type: ignore[attr-defined]
            self._methods[path] = channel, method
        return method

    def stream_method(self, path: str) -> Any:
        """Returns a method of the same channel that streams both ways."""
        return self.get().stream_stream(path)  # type: ignore[attr-defined]

    def take(self) -> C | None:
        """Gives up what was made and returns it, to be closed; None where nothing was made here."""
        made, self._made = self._made, None
        self._methods.clear()
        return made if made is not None and self._home == self._place() else None
