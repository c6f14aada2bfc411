"""Requests that have come before, but for the bytes of their tensors: they are known again, and not parsed.

Whoever trains asks for the same again and again. What such requests have in common is their form: all
bytes but those of tensors, each in its place. Protobuf would make the same message of every one, with other
bytes in its tensors; so that message is kept, and what is read of it as well.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from lossd.wire import LARGE_BYTES, Buffer, Parcel, Payloads, cut_out
from lossd_server.errors import InvalidInputError, Reason

M = TypeVar("M", bound=Message)
P = TypeVar("P")

_MOST_KEPT = 128
"""Lengths and beginnings; of those that have not come again, the oldest is forgotten first."""

_MOST_FIXED_BYTES = 2 << 10
"""Of a form: what has more of them has many tensors, and gains little."""

_MOST_FIELDS = 256
"""Likewise, so that learning a form is no long work."""

_BEGINNING = 12
"""Bytes by which forms are told apart at first sight, with their length: no tensor's are among them."""

_MOST_ALIKE = 4
"""Forms of one length and beginning: a gradient in shared memory lies now here, now there."""

_CREDIT, _PRICE = 64, 8
"""A form that is learned costs so much of what there is for a length and beginning, and each request that is
known again brings 1: where too many forms take turns, none is learned any more."""


class Form(Generic[M]):
    """What some requests have in common.

    Attributes:
        message: A message with stand-ins for the bytes of its tensors; nobody may change it.
        plan: What was made of it; None before.
        is_checked: Whether the types and shapes of a request's tensors were found to go together: then those
            of all do.
        recipe: What became of plan and tensors; None before, and where each request is to be read whole.
    """

    __slots__ = ("_fixed", "_places", "is_checked", "message", "plan", "recipe")

    def __init__(self, message: M, data: bytes, places: list[tuple[int, int]]) -> None:
        self.message = message
        self.plan: Any = None
        self.is_checked = False
        self.recipe: Any = None
        self._places = places
        starts = [0, *(stop for _, stop in places)]
        stops = [*(start for start, _ in places), len(data)]
        self._fixed = [(start, data[start:stop]) for start, stop in zip(starts, stops, strict=True)]

    @property
    def fixed_bytes(self) -> int:
        """How many bytes are the same in each request."""
        return sum(len(fixed) for _, fixed in self._fixed)

    def payloads_of(self, data: bytes, at: int) -> Payloads | None:
        """Returns what stand-ins stand for in a request as long as this; None where its form is another.

        Args:
            data: Bytes that end with it.
            at: Where it begins.
        """
        for start, fixed in self._fixed:
            if not data.startswith(fixed, at + start):
                return None
        return Payloads([data[at + start : at + stop] for start, stop in self._places])


@dataclass(slots=True, eq=False)  # not frozen: that takes four times as long to make
class Request(Generic[M]):
    """A request: its message, what the message's stand-ins stand for, and its form if that is known."""

    message: M
    payloads: Payloads = field(default_factory=Payloads)
    form: Form[M] | None = None

    def planned(self, make: Callable[..., P], *arguments: Any) -> P:
        """Returns what is made of the message alone, once for all requests of a form.

        Args:
            make: Makes it of the message.
            *arguments: What else it takes, always the same.
        """
        if self.form is None:
            return make(self.message, *arguments)
        if self.form.plan is None:
            self.form.plan = make(self.message, *arguments)
        plan: P = self.form.plan
        return plan

    @property
    def is_checked(self) -> bool:
        """Whether the types and shapes of its tensors are known to go together."""
        return self.form is not None and self.form.is_checked

    @property
    def recipe(self) -> Any:
        """What is known to be done with requests of its form; None where nothing is."""
        return None if self.form is None else self.form.recipe

    def mark_as_checked(self, make: Callable[[Any, Payloads], Any]) -> None:
        """Says that they do, and so those of all requests of its form.

        Args:
            make: Makes the recipe of its form, where there is one, of its plan and payloads. Called once, or
                by each of some threads that come together.
        """
        if self.form is not None and not self.form.is_checked:
            self.form.recipe = make(self.form.plan, self.payloads)
            self.form.is_checked = True


class _Alike:
    """Requests of one length and beginning: their forms, the latest first, and whether to learn more."""

    __slots__ = ("credit", "forms", "is_wanted")

    def __init__(self) -> None:
        self.credit = _CREDIT
        self.forms: list[Form[Any]] = []
        self.is_wanted = False


class Forms(Generic[M]):
    """Reads the requests of a method. Threads may share it.

    Args:
        message_type: Their type.
    """

    def __init__(self, message_type: type[M]) -> None:
        self._type = message_type
        self._known: dict[tuple[int, bytes], _Alike] = {}
        self._lock = threading.Lock()

    def read(self, data: Buffer, at: int = 0) -> Request[M]:
        """Returns the request that bytes hold from some place to their end.

        Raises:
            InvalidInputError: `MALFORMED_REQUEST`: they hold none.
        """
        if isinstance(data, bytes) and len(data) < LARGE_BYTES:
            key = len(data) - at, data[at : at + _BEGINNING]
            alike = self._known.get(key)
            if alike is None:
                self._remember(key)  # one that comes once need not be learned
            elif (found := self._again(data, at, alike)) is not None:
                return found
        parcel = parse(self._type, memoryview(data)[at:] if at else data)
        return Request(parcel.message, parcel.payloads)

    def _again(self, data: bytes, at: int, alike: _Alike) -> Request[M] | None:
        """Returns a request of a form that is known, or is now; None where that is not to be."""
        for form in alike.forms:
            payloads = form.payloads_of(data, at)
            if payloads is not None:
                alike.credit = min(alike.credit + 1, _CREDIT)
                alike.is_wanted = True
                return Request(form.message, payloads, form)
        learned = self._learn(data[at:], alike) if alike.credit >= _PRICE else None
        if learned is None or (payloads := learned.payloads_of(data, at)) is None:
            return None
        return Request(learned.message, payloads, learned)

    def _learn(self, data: bytes, alike: _Alike) -> Form[M] | None:
        alike.credit -= _PRICE
        parts = cut_out(self._type, data, _MOST_FIELDS)
        form = None if parts is None else Form(parts[0], data, parts[1])
        if form is None or form.fixed_bytes > _MOST_FIXED_BYTES:
            return None
        alike.forms = [form, *alike.forms[: _MOST_ALIKE - 1]]
        return form

    def _remember(self, key: tuple[int, bytes]) -> None:
        with self._lock:
            while len(self._known) >= _MOST_KEPT:
                oldest = next(iter(self._known))
                alike = self._known.pop(oldest)
                if alike.is_wanted:  # since it was last looked at
                    alike.is_wanted = False
                    self._known[oldest] = alike
            self._known.setdefault(key, _Alike())


def parse(message_type: type[M], data: Buffer) -> Parcel[M]:
    """Returns the message that bytes hold; raises `MALFORMED_REQUEST` when they hold none."""
    try:
        return Parcel.read(message_type, data)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.full_name
        raise InvalidInputError(
            Reason.MALFORMED_REQUEST, f"{len(data)} bytes are no {name}", length=len(data), type=name
        ) from error
