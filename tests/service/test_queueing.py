"""Who is served when: small calls beside large ones, callers that left, and a device that hangs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.config import ServerConfig
from lossd_server.engine import Asker
from lossd_server.errors import InvalidInputError
from lossd_server.rpc.caller import Caller
from tests.domain.regions import wait_until
from tests.service import custom_modules
from tests.service.metrics import eventually, value
from tests.service.sharing import answer_inline, focal, shared, sharing_caller
from tests.service.support import (
    connect,
    focal_arrays,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
)

HELD = ("tests.service.custom_modules:Held",)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Asking:
    """Brings calls one after another while the device is held, and keeps record of whose turn it is."""

    def __init__(self, server, monkeypatch):
        self.engine, self.order, self.names = server._engine, [], {}
        self.pool = ThreadPoolExecutor(8)
        take_steps = self.engine._turns._work

        def record(tasks):
            self.order += [self.names.get(len(task.steps[0].items)) for task in tasks]
            take_steps(tasks)

        monkeypatch.setattr(self.engine._turns, "_work", record)

    def ask(self, name, stub, request):
        """Asks; a caller is known by its number of items."""
        self.names[len(request.items)] = name
        waiting = self.engine.waiting_count
        self.pool.submit(stub.ComputeLoss, request, timeout=60)
        wait_until(lambda: self.engine.waiting_count == waiting + 1)

    def end(self):
        custom_modules.release.set()
        self.pool.shutdown()


@contextmanager
def own_connection(server):
    """A stub that shares its connection with no other of this process."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.addresses[0], options=options) as channel:
        yield LossServiceStub(channel)


def focal_request(items, rows=3, **settings):
    arrays = focal_arrays(np.random.default_rng(rows), rows)
    return loss_request(losses_pb2.FocalLoss(), [arrays] * items, **settings)


def test_a_small_call_goes_before_large_ones_that_waited_longer(fresh, held, monkeypatch):
    with own_connection(fresh) as holder, own_connection(fresh) as one, own_connection(fresh) as other:
        held(holder)
        asking = Asking(fresh, monkeypatch)
        for _ in range(3):
            asking.ask("large", one, focal_request(40))
        asking.ask("small", other, focal_request(1))
        asking.end()
    assert asking.order == ["small", "large", "large", "large"]


def test_the_queue_is_measured(fresh, held):
    with connect(fresh) as stub, ThreadPoolExecutor(1) as pool:
        call = held(stub)
        waiting = pool.submit(stub.ComputeLoss, good_loss_request(), timeout=60)
        eventually(lambda: value(fresh, "lossd_queue_length") == 1)
        custom_modules.release.set()
        assert call.result(30).results
        assert waiting.result(30).timings.queue_us > 0
    assert value(fresh, "lossd_queue_length") == 0
    assert value(fresh, "lossd_device_wedged") == 0


def test_what_goes_together_is_measured_and_answers_the_same(held):
    requests = [
        loss_request(losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(n), n + 1)] * 2)
        for n in range(3)
    ]
    with make_server(load=HELD, batching="on") as server, connect(server) as stub:
        alone = [stub.ComputeLoss(request).results for request in requests]
        jobs, items = (value(server, f"lossd_device_batch_{name}_sum") for name in ("jobs", "items"))
        call = held(stub)
        with ThreadPoolExecutor(3) as pool:
            together = [pool.submit(stub.ComputeLoss, request, timeout=60) for request in requests]
            wait_until(lambda: server._engine.waiting_count == 3)
            count = value(server, "lossd_device_batch_jobs_count")
            custom_modules.release.set()
            assert [answer.result(60).results for answer in together] == alone
        assert call.result(30).results
        assert value(server, "lossd_device_batch_jobs_count") == count + 1
        assert value(server, "lossd_device_batch_jobs_sum") == jobs + 4
        assert value(server, "lossd_device_batch_items_sum") == items + 7


def test_a_call_that_is_cancelled_in_the_queue_is_dropped_and_counted(fresh, held):
    with connect(fresh) as stub:
        call = held(stub)
        waiting = stub.ComputeLoss.future(good_loss_request())
        wait_until(lambda: fresh._engine.waiting_count == 1)
        waiting.cancel()
        wait_until(lambda: fresh._engine.waiting_count == 0)
        eventually(
            lambda: value(fresh, "lossd_refusals_total", method="ComputeLoss", reason="CANCELLED") == 1
        )
        assert not call.done()
        custom_modules.release.set()
        assert call.result(30).results
        assert stub.ComputeLoss(good_loss_request(), timeout=30).results
    assert value(fresh, "lossd_stage_seconds_count", method="ComputeLoss", stage="compute") == 2


def test_an_assignment_for_nobody_is_not_begun(fresh, monkeypatch):
    late = Caller(asker=Asker(deadline=0.0))
    monkeypatch.setattr(Caller, "of", lambda *_: late)
    with connect(fresh) as stub:
        assert refusal(stub.AssignTargets, good_assign_request()).reason == "DEADLINE_EXCEEDED"
        monkeypatch.undo()
        assert stub.AssignTargets(good_assign_request(), timeout=60).results
    reasons = {"method": "AssignTargets", "reason": "DEADLINE_EXCEEDED"}
    eventually(lambda: value(fresh, "lossd_refusals_total", **reasons) == 1)


def test_a_call_tried_twice_writes_nothing_after_its_second_answer(tmp_path, held):
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), load=HELD) as server,
        connect(server) as stub,
        sharing_caller(server) as caller,
    ):
        request, _ = focal(caller)
        expected = answer_inline(caller, caller.stub.ComputeLoss(request))
        call = held(stub)
        first = caller.stub.ComputeLoss.future(request)
        wait_until(lambda: server._engine.waiting_count == 1)
        second = caller.stub.ComputeLoss.future(request)
        wait_until(lambda: server._engine.waiting_count == 2)
        first.cancel()
        custom_modules.release.set()
        assert call.result(30).results
        assert answer_inline(caller, second.result(30)) == expected
        caller.memory[:] = 7
        assert len(stub.ComputeLoss(good_loss_request(), timeout=30).results) == 1
        eventually(lambda: value(server, "lossd_in_flight") == 0)
        assert (caller.memory == 7).all()


def test_callers_over_a_unix_socket_are_told_apart_by_the_memory_that_they_share(tmp_path, held, monkeypatch):
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), load=HELD) as server,
        connect(server) as stub,
        sharing_caller(server) as one,
        sharing_caller(server) as other,
    ):
        held(stub)
        asking = Asking(server, monkeypatch)
        for _ in range(3):
            asking.ask("one", one.stub, shared(one, focal_request(2, gradients=["inputs"])))
        asking.ask("other", other.stub, shared(other, focal_request(1, gradients=["inputs"])))
        asking.end()
    assert asking.order == ["other", "one", "one", "one"]


def test_a_want_of_memory_is_that_requests_alone():
    def request(*sizes):
        items = [{"pred": np.ones(size, np.float32)} for size in sizes]
        return loss_request(losses_pb2.CustomLoss(name="Hungry"), items)

    with make_server(load=("tests.service.custom_modules:Hungry",)) as server, connect(server) as stub:
        assert len(stub.ComputeLoss(request(1, 2)).results) == 2
        found = refusal(stub.ComputeLoss, request(1, 3))
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
        assert found.metadata["field"] == "items[1].custom"
        assert custom_modules.SECRET not in found.message
        assert stub.ComputeLoss(request(2)).results
        assert stub.ComputeLoss(good_loss_request()).results


def test_a_device_that_hangs_turns_health_and_calls_away_until_it_is_back(held):
    with (
        make_server(load=HELD, wedged_seconds=0.3) as server,
        connect(server) as stub,
        grpc.insecure_channel(server.addresses[0]) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        call = held(stub)
        waiting = stub.ComputeLoss.future(good_loss_request())
        assert next(watch).status == NOT_SERVING
        for refused in (lambda _: waiting.result(30), stub.ComputeLoss):
            found = refusal(refused, good_loss_request())
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DEVICE_WEDGED")
            assert found.retry_seconds > 0
        assert value(server, "lossd_device_wedged") == 1
        assert stub.AssignTargets(good_assign_request(), timeout=30).results
        custom_modules.release.set()
        assert call.result(30).results
        assert next(watch).status == SERVING
        assert stub.ComputeLoss(good_loss_request(), timeout=30).results
        watch.cancel()


def test_a_server_that_stops_stays_out_of_service_when_its_device_is_back(held):
    server = make_server(load=HELD, wedged_seconds=0.2, drain_seconds=30)
    server.start()
    with connect(server) as stub, grpc.insecure_channel(server.addresses[0]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        call = held(stub)
        assert next(watch).status == NOT_SERVING
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(lambda: server._engine._is_draining)
        custom_modules.release.set()
        assert call.result(30).results
        assert set(statuses(watch)) == {NOT_SERVING}
        stopping.join(60)


def statuses(watch):
    """What a watcher of health is told until the server has gone."""
    with suppress(grpc.RpcError):
        for answer in watch:
            yield answer.status


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("batching", "sometimes"),
        ("batch_max_items", 0),
        ("batch_max_bytes", 0),
        ("batch_wait_us", -1),
        ("batch_wait_us", 2_000_000),
        ("wedged_seconds", -1.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, wrong):
    with pytest.raises(InvalidInputError) as caught:
        ServerConfig(**{name: wrong})
    assert caught.value.field == name
    assert str(wrong) in str(caught.value)
