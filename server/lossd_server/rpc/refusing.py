"""Handlers that refuse a call before its body is read."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc

from lossd_server.errors import LossdError
from lossd_server.rpc.method_names import name_of
from lossd_server.rpc.refusals import Refusals

_THREADS = 2
"""Threads that turn calls away: each needs one for tens of microseconds."""


class RefusingHandlers:
    """Makes handlers that refuse calls of any kind.

    They are of the kind that takes a stream of requests: gRPC calls it at once, where it has a thread wait
    for the body of any other. They have threads of their own, so that refusals wait for nobody's work.

    Args:
        refusals: Where refusals are recorded.
    """

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="lossd-refusing")

    def handler(self, path: str, error: LossdError) -> "grpc.RpcMethodHandler[Any, Any]":
        """Returns a handler that refuses.

        Args:
            path: What gRPC calls the method; one that the server has, since it becomes a label.
            error: Why.
        """

        def refuse(_bodies: Iterator[Any], call: grpc.ServicerContext) -> NoReturn:
            self._refusals.abort(name_of(path), error, call)

        refuse.experimental_thread_pool = self._pool  # type: ignore[attr-defined]  # where gRPC looks for it
        return grpc.stream_unary_rpc_method_handler(refuse)

    def close(self) -> None:
        """Lets the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)
