"""Interceptors in front of handlers."""

from unittest import mock

import grpc
import pytest

from lossd_server.rpc.interceptor import Intercepted

KNOWN = "/lossd.v1.LossService/ComputeLoss"


class Handlers(grpc.GenericRpcHandler):
    """The handler of one method."""

    def service(self, handler_call_details):
        return "handler" if handler_call_details.method == KNOWN else None


class Around(grpc.ServerInterceptor):
    """Says that it is around a handler."""

    def __init__(self, name):
        self._name = name

    def intercept_service(self, continuation, handler_call_details):
        found = continuation(handler_call_details)
        return None if found is None else f"{self._name}({found})"


@pytest.mark.parametrize(
    ("names", "found"), [([], "handler"), (["a"], "a(handler)"), (["a", "b", "c"], "a(b(c(handler)))")]
)
def test_the_first_interceptor_is_the_outermost(names, found):
    intercepted = Intercepted(Handlers(), [Around(name) for name in names])
    for _ in range(2):
        assert intercepted.service(mock.Mock(method=KNOWN)) == found


def test_a_method_of_others_is_left_to_them():
    assert Intercepted(Handlers(), [Around("a")]).service(mock.Mock(method="/other/Method")) is None
