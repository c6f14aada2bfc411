"""On which cores a server's threads run."""

import os
import threading
from functools import partial

import numpy as np
import pytest

from lossd.v1 import losses_pb2
from tests.domain.regions import wait_until
from tests.service.support import connect, focal_arrays, good_loss_request, loss_request, make_server

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, and a system that says which")


def cores_seen(monkeypatch, requests, **settings):
    """On how many cores a server evaluates each of some requests, and on how many its handlers run."""
    seen, others = [], set(threading.enumerate())
    with make_server(**settings) as server, connect(server) as stub:
        evaluator = server._engine._evaluator

        def watched(work, *given):
            seen.append(len(os.sched_getaffinity(0)))
            return work(*given)

        for name in ("take_job", "take_steps"):
            monkeypatch.setattr(evaluator, name, partial(watched, getattr(evaluator, name)))
        for request in requests:
            stub.ComputeLoss(request)
        handlers = {
            len(os.sched_getaffinity(thread.native_id))
            for thread in set(threading.enumerate()) - others
            if thread.name.startswith("lossd-rpc")
        }
    assert os.sched_getaffinity(0) == CORES
    return seen, handlers


def large_loss_request():
    return loss_request(losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(0), 20_000)])


def test_small_requests_share_a_core_and_large_ones_have_all(monkeypatch):
    requests = [good_loss_request(), large_loss_request(), good_loss_request()]
    assert cores_seen(monkeypatch, requests) == ([1, len(CORES), 1], {1})


def test_spread_is_all_cores_for_everyone(monkeypatch):
    requests = [good_loss_request(), large_loss_request()]
    assert cores_seen(monkeypatch, requests, spread=True) == ([len(CORES)] * 2, {len(CORES)})


def test_what_torch_does_has_all_cores(monkeypatch):
    arrays = {"inputs": np.zeros((3, 5)), "targets": np.zeros(3, np.int64)}  # float64 has no kernel
    seen, _ = cores_seen(monkeypatch, [loss_request(losses_pb2.FocalLoss(), [arrays])])
    assert seen == [len(CORES)]


def test_whoever_waits_for_bodies_is_not_at_home(monkeypatch):
    monkeypatch.setattr("lossd_server.engine.home._LOOK_SECONDS", 60.0)  # whoever else has this core
    others = set(threading.enumerate())
    with make_server() as server, connect(server) as stub:
        stub.ComputeLoss(good_loss_request())
        threads = {thread.name: thread.native_id for thread in set(threading.enumerate()) - others}
        wait_until(lambda: os.sched_getaffinity(threads["lossd-bodies"]) == CORES)
        assert os.sched_getscheduler(threads["lossd-bodies"]) == os.SCHED_OTHER
        handlers = [thread for name, thread in threads.items() if name.startswith("lossd-rpc")]
        assert {os.sched_getscheduler(thread) for thread in handlers} == {os.SCHED_BATCH}
