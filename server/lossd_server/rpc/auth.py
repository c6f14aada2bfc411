"""Who may call: a bearer token, judged before the body of a call is read, and what it may ask."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health

from lossd_server.errors import AccessError, LossdError, Reason
from lossd_server.rpc.method_names import IN_CHUNKS
from lossd_server.rpc.rates import Allowance
from lossd_server.rpc.refusing import RefusingHandlers
from lossd_server.rpc.tokens import Account, Tokens

_OPEN = f"/{health.SERVICE_NAME}/"
"""What needs no token: probes have none, and health tells a stranger nothing."""

_SCHEME = "bearer "
_LONGEST_PAUSE_SECONDS = 0.1
"""How long a stream is paced before it is seen whether its caller is still there."""

_Handler = Any
"""A `grpc.RpcMethodHandler`; only its stub is generic, and only at run time are its attributes known."""


class AuthInterceptor(grpc.ServerInterceptor):
    """Refuses calls without a good token, and those of a token that asks too much.

    Requests of a stream are not refused, but read no faster than their token may ask.

    Args:
        tokens: Who may call.
        refusing: Makes what refuses.
    """

    def __init__(self, tokens: Tokens, refusing: RefusingHandlers) -> None:
        self._tokens = tokens
        self._refusing = refusing
        self._limited: dict[tuple[str, str], tuple[Account, _Handler, _Handler]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Returns the handler of a call, or one that refuses it."""
        handler, path = continuation(handler_call_details), handler_call_details.method
        if handler is None or path.startswith(_OPEN):
            return handler
        try:
            account = self._account(handler_call_details)
            if not _is_stream(handler, path) and (refusal := account.allowance.begin()):
                raise refusal
        except LossdError as error:
            return self._refusing.handler(path, error)
        return self._limited_once(handler, path, account) if account.limits else handler

    def _account(self, details: grpc.HandlerCallDetails) -> Account:
        """Returns who calls; raises `AccessError` where nobody knows."""
        values = [value for name, value in details.invocation_metadata if name == "authorization"]
        value = str(values[0]) if values else ""
        if value[: len(_SCHEME)].lower() != _SCHEME:
            raise AccessError(
                Reason.UNAUTHENTICATED, "the call has no token: want the metadata authorization: Bearer …"
            )
        account = self._tokens.account(value[len(_SCHEME) :].strip())
        if account is None:
            raise AccessError(Reason.UNAUTHENTICATED, "the call's token is none that this server knows")
        return account

    def _limited_once(self, handler: _Handler, path: str, account: Account) -> _Handler:
        """Returns the handler that charges an account, the same for all its calls of a method."""
        known, wrapped, limited = self._limited.get((path, account.name), (None, None, None))
        if known is not account or wrapped is not handler:
            limited = _limited(handler, path, account.allowance)
            self._limited[path, account.name] = account, handler, limited
        return limited


def _is_stream(handler: _Handler, path: str) -> bool:
    """Whether there are many requests to a call; to unary methods gRPC may give streams of one."""
    return bool(handler.request_streaming and handler.response_streaming) and not path.endswith(IN_CHUNKS)


def _limited(handler: _Handler, path: str, allowance: Allowance) -> _Handler:
    """Returns a handler whose messages are charged, and on a stream paced."""
    deserialize = handler.request_deserializer or bytes
    if not _is_stream(handler, path):

        def charge(data: bytes) -> Any:
            allowance.charge(len(data))
            return deserialize(data)

        return handler._replace(request_deserializer=charge)

    def answer(messages: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[Any]:
        answers: Iterator[Any] = handler.stream_stream(_paced(messages, deserialize, allowance, call), call)
        return answers

    threads = getattr(handler.stream_stream, "experimental_thread_pool", None)
    answer.experimental_thread_pool = threads  # type: ignore[attr-defined]  # where gRPC looks for it
    return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)


def _paced(
    messages: Iterator[bytes],
    deserialize: Callable[[bytes], Any],
    allowance: Allowance,
    call: grpc.ServicerContext,
) -> Iterator[Any]:
    """Yields requests, each when there is one left to take."""
    for message in messages:
        while (refusal := allowance.begin()) and call.is_active():
            time.sleep(min(refusal.retry_seconds or 0.0, _LONGEST_PAUSE_SECONDS))
        allowance.charge(len(message))
        request = deserialize(message)
        del message  # large, and not to be kept while it is worked on
        yield request
