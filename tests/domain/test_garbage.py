"""What a call held is free when the call has failed, and does not wait for a collection of cycles."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from lossd_server.engine import Asker
from lossd_server.errors import LossdError, Reason
from lossd_server.rpc.pipeline import Pipeline
from tests.domain.jobs import cpu_engine, random_job


@pytest.fixture(autouse=True)
def no_collections():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Nobody:
    """Admits requests, and counts none."""

    def begin(self):
        """Nothing to count."""

    end = begin


def failed(call, *arguments):
    """Makes a call that fails, and forgets why."""
    try:
        call(*arguments)
    except LossdError:
        return
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("asker", [Asker(deadline=0.0), Asker(is_gone=lambda: True)])
def test_tensors_of_a_job_whose_caller_is_gone(asker):
    with closing(cpu_engine()) as engine:
        job = random_job("rows", [3], 0)
        tensor = weakref.ref(job.items[0].arguments["inputs"])
        failed(engine.compute, job, asker)
        del job
        assert tensor() is None


def test_a_caller_that_is_gone_is_told_without_a_cycle():
    asker = Asker(is_gone=lambda: True)
    held = []

    def check():
        holder = set()
        held.append(weakref.ref(holder))
        asker.check()

    failed(check)
    assert held[0]() is None


def test_a_stream_whose_request_is_none():
    def tasks():
        yield lambda: b"answer"
        raise LossdError(Reason.MALFORMED_REQUEST, "is none")

    with ThreadPoolExecutor(1) as pool:
        pipeline = Pipeline(pool, Nobody(), lambda: None)
        held = weakref.ref(pipeline)
        failed(list, pipeline.answers(tasks()))
        del pipeline
    assert held() is None


def test_a_stream_whose_caller_is_gone():
    def tasks():
        yield lambda: b"answer"
        error = RuntimeError("gone")
        raise error  # as gRPC does: its frame refers to the error, and the error to its frame

    with ThreadPoolExecutor(1) as pool:
        pipeline = Pipeline(pool, Nobody(), lambda: None)
        held = weakref.ref(pipeline)
        assert list(pipeline.answers(tasks())) == [b"answer"]
        del pipeline
    assert held() is None
