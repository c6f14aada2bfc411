"""The methods of the service: what reads the requests of each, and what answers them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lossd.envelopes import opened
from lossd.wire import Buffer
from lossd.writing import Piece
from lossd_server.rpc.caller import Caller
from lossd_server.rpc.forms import Forms, Request, parse
from lossd_server.rpc.stages import Stages


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A method: the name that metrics and logs use, what reads its requests, and what answers them."""

    name: str
    forms: Forms[Any]
    answer: Callable[[Any, Stages, Caller], list[Piece]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMethod:
    """The stream twin of a method and its two envelopes."""

    method: Method
    request: type[Any]
    response: type[Any]

    def read(self, data: Buffer) -> tuple[int, Request[Any] | None]:
        """Returns the mark and the request, None where there is none, that the bytes of an envelope hold."""
        parts = opened(data)
        if parts is not None:
            mark, start = parts
            return mark, self.method.forms.read(data, start)
        parcel = parse(self.request, data)
        message, request = parcel.message, None
        if message.HasField("request"):
            request = Request(message.request, parcel.payloads)
        return message.id, request
