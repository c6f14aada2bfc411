"""What callers of a kind call, and what they are to be answered, found out by one call of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import grpc

from lossd_server.bench.load.answers import failure_of, read_stream_answer, result_bytes
from lossd_server.bench.load.callers import Target, connect
from lossd_server.bench.load.kinds import KINDS, Form, payloads
from lossd_server.bench.load.serving import Served, serve_bare
from lossd_server.errors import InvalidInputError, Reason, UnavailableError


def make_target(kind: str, served: Served, timeout: float, resources: ExitStack) -> Target:
    """Returns what callers of a kind call.

    Args:
        kind: Its name in `KINDS`.
        served: The server.
        timeout: After which a call is given up, seconds.
        resources: Ends what is started for it.

    Raises:
        InvalidInputError: The kind shares memory, and the server is on no Unix socket.
        UnavailableError: Nobody answers.
    """
    form = KINDS[kind].form
    if form == Form.SHARED:
        return Target(kind=kind, address=_shared(kind, served), payloads=(), expected=None, timeout=timeout)
    requests = payloads(KINDS[kind])
    address = served.address
    if form == Form.BARE:
        like = Target(kind="assign", address=address, payloads=requests, expected=None, timeout=timeout)
        address = resources.enter_context(serve_bare(_ask(like) or b"")).address
        return Target(kind=kind, address=address, payloads=requests, expected=None, timeout=timeout)
    asked = Target(kind=kind, address=address, payloads=requests, expected=None, timeout=timeout)
    answer = _ask(asked)
    expected = None if answer is None else result_bytes(KINDS[kind].method, answer)
    return Target(kind=kind, address=address, payloads=requests, expected=expected, timeout=timeout)


def _shared(kind: str, served: Served) -> str:
    if served.unix_address is None:
        message = f"has {kind!r}, which takes a target on a Unix socket"
        raise InvalidInputError(Reason.INVALID_OPTION, message, field="mix", value=kind)
    return served.unix_address


def _ask(target: Target) -> bytes | None:
    """Returns the response to one request; None where it is to be refused.

    Raises:
        UnavailableError: Nobody answers.
    """
    with connect(target.address) as channel:
        try:
            return _answer(target, channel)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                return None
            message = f"no answer from {target.address}: {failure_of(error).reason}"
            raise UnavailableError(Reason.INTERNAL, message) from error


def _answer(target: Target, channel: grpc.Channel) -> bytes | None:
    method, payload = KINDS[target.kind].method, target.payloads[0]
    if KINDS[target.kind].form == Form.UNARY:
        ask: Callable[..., bytes] = channel.unary_unary(method)
        return ask(payload, timeout=target.timeout)
    stream: Callable[..., Iterator[bytes]] = channel.stream_stream(method)
    _, outcome = read_stream_answer(method, next(stream(iter([payload]), timeout=target.timeout)))
    return outcome if isinstance(outcome, bytes) else None
