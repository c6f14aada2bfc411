"""The end of a server: signals, and what becomes of the work that is on its way."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lossd_client import Client, CustomLoss, DeadlineError, FocalLoss, LossdError, UnavailableError
from tests.whole.conftest import serving

LOGITS, TARGETS = np.ones((8, 5), np.float32), np.zeros(8, np.int64)


@contextmanager
def sleeping(tmp_path, seconds, *options, target=None):
    """A server, and a call to it that takes so many seconds and has begun."""
    (tmp_path / "sleepy.py").write_text((Path(__file__).parent / "sleepy.py").read_text())
    with (
        serving("--load", "sleepy:Sleepy", *options, directory=tmp_path) as (process, address, _),
        Client(target or address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(
            client.compute_loss,
            CustomLoss("Sleepy"),
            {"pred": np.full(3, seconds / 3, np.float32)},
            gradients=True,
        )
        wait_until(lambda: (tmp_path / "asleep").exists() or call.done())
        yield process, client, call


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_answered_and_the_server_ends_with_0(tmp_path, number):
    with sleeping(tmp_path, 2) as (process, _, call):
        process.send_signal(number)
        assert float(call.result(timeout=30).loss) == pytest.approx(2)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "drained=True" in log


def test_work_that_outlasts_the_drain_is_handed_back(tmp_path):
    with sleeping(tmp_path, 30, "--drain-seconds", "0.5") as (process, _, call):
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=15)
        assert isinstance(call.exception(timeout=30), LossdError)
    assert process.returncode == 0
    assert "drained=False" in log


def test_a_drain_of_no_seconds_hands_back_at_once(tmp_path):
    with sleeping(tmp_path, 30, "--drain-seconds", "0") as (process, _, call):
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=15)
        assert isinstance(call.exception(timeout=30), UnavailableError)
    assert process.returncode == 0


def test_a_second_signal_ends_it_at_once(tmp_path):
    with sleeping(tmp_path, 30, "--drain-seconds", "600") as (process, client, call):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_serving(client))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=15)
        assert isinstance(call.exception(timeout=30), UnavailableError)
    assert process.returncode == 1


def is_serving(client):
    """Whether new work is taken, be it only to wait behind what is being evaluated."""
    try:
        client.compute_loss(FocalLoss(), LOGITS, TARGETS, timeout=1)
    except DeadlineError:
        return True
    except UnavailableError:
        return False
    return True


def test_health_is_not_serving_while_it_drains(tmp_path):
    target = f"unix:{tmp_path}/lossd.sock"
    with sleeping(tmp_path, 4, "--listen", target) as (process, _, call):
        with grpc.insecure_channel(target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert call.result(timeout=30)
        assert process.wait(timeout=30) == 0


def test_an_open_stream_is_answered_and_then_ended(tmp_path):
    """What of a stream was read is answered; what was not is the caller's to ask again."""
    with serving() as (process, address, _), Client(address) as client:
        go_on = threading.Event()

        def items():
            for _ in range(3):
                yield LOGITS, TARGETS
            go_on.wait(60)
            yield LOGITS, TARGETS

        results = client.compute_loss_stream(FocalLoss(), items())
        assert [float(next(results).loss) for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0  # at once, and not when the caller has made up its mind
        go_on.set()
        with pytest.raises(UnavailableError):
            next(results)


def test_shared_memory_in_use_is_drained_too_and_no_socket_is_left(tmp_path):
    path = tmp_path / "lossd.sock"
    options = ("--listen", f"unix:{path}")
    with sleeping(tmp_path, 2, *options, target=f"unix:{path}") as (process, client, call):
        assert client._sharing.pool() is not None
        process.send_signal(signal.SIGTERM)
        result = call.result(timeout=30)
        assert process.wait(timeout=30) == 0
        assert (result.gradients["pred"] == 1).all()
    assert not path.exists()
    assert not Path(f"{path}.shm").exists()
