"""Where tensors lie on both sides of a call, and so how often they were copied between them."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lossd.wire import Parcel
from lossd_client import Client, FocalLoss, _loss_requests
from lossd_server.losses import FocalLoss as LocalFocalLoss
from tests.client.support import same_bits
from tests.domain.support import needs_a_compiler
from tests.service.support import make_server

pytestmark = needs_a_compiler  # without kernels a torch tensor is made of each array

MEBIBYTE = 1 << 20

# 50 MiB each, by shapes that move the elements in their message by a byte from one to the next.
SHAPES = [(16, 80, 100, 103), (16, 80, 50, 206), (16, 10, 130, 634), (128, 5, 144, 144)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("sockets") / "lossd.sock"
    with make_server(listen=(f"unix:{path}", "127.0.0.1:0")) as running:
        yield running


@pytest.fixture
def evaluated(monkeypatch):
    """Addresses, on the server's side, of the inputs of evaluations and of where gradients go."""
    found = []
    evaluate = LocalFocalLoss.evaluate_arrays

    def noted(self, arguments, options, place):
        evaluation = evaluate(self, arguments, options, place)
        (gradient,) = evaluation.gradients["inputs"]
        found.append((address(arguments["inputs"]), address(gradient)))
        return evaluation

    monkeypatch.setattr(LocalFocalLoss, "evaluate_arrays", noted)
    return found


@pytest.fixture
def received(monkeypatch):
    """The bytes of all large messages that came in on either side, not of their chunks."""
    found = []
    read = Parcel.read.__func__

    def noted(cls, kind, data):
        if len(data) > 2 * MEBIBYTE:
            found.append(data)
        return read(cls, kind, data)

    monkeypatch.setattr(Parcel, "read", classmethod(noted))
    return found


def address(array):
    return array.__array_interface__["data"][0]


def shared_place(where):
    """File and place in it of an address: the same for all who have mapped that memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop, offset, inode = re.match(r"(\w+)-(\w+) \S+ (\w+) \S+ (\d+)", line).groups()
        if "/memfd:lossd" in line and int(start, 16) <= where < int(stop, 16):
            return inode, where - int(start, 16) + int(offset, 16)
    return None


def tensors(shape):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, np.float32), rng.integers(-1, shape[1], (shape[0], *shape[2:]))


def lies_in(message, array):
    """Where the elements of an array lie in the bytes of a message."""
    begins = bytes(message).find(memoryview(array).cast("B")[:64])
    assert begins >= 0
    return address(np.frombuffer(message, np.uint8)) + begins


def test_in_shared_memory_nothing_is_copied(both, evaluated):
    logits, labels = tensors(SHAPES[0])
    with Client(both.addresses[0]) as client:
        mine, its_labels = client.allocate(logits.shape), client.allocate(labels.shape, labels.dtype)
        mine[:], its_labels[:] = logits, labels
        client.compute_loss(FocalLoss(), mine, its_labels, gradients=True).release()
        tracemalloc.start()
        try:
            result = client.compute_loss(FocalLoss(), mine, its_labels, gradients=True)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        gradient = result.gradients["inputs"]
        read, written = map(shared_place, evaluated[-1])
        assert read == shared_place(address(mine)) is not None
        assert written == shared_place(address(gradient)) is not None
        # Both sides, in this one process. Labels are checked in a copy, which is all.
        assert peak < labels.nbytes + MEBIBYTE
        assert same_bits(mine, logits)


def test_what_is_not_made_there_is_copied_once(both, evaluated):
    logits, labels = tensors(SHAPES[0])
    with Client(both.addresses[0]) as client:
        gradient = client.compute_loss(FocalLoss(), logits, labels, gradients=True).gradients["inputs"]
        read, written = map(shared_place, evaluated[-1])
        assert None not in (read, written)
        assert written == shared_place(address(gradient))


@pytest.mark.parametrize("in_chunks", [True, False], ids=["in chunks", "whole"])
@pytest.mark.parametrize("shape", SHAPES)
def test_messages_are_read_where_they_were_received(both, evaluated, received, monkeypatch, shape, in_chunks):
    if not in_chunks:
        monkeypatch.setattr(_loss_requests, "LEAST_BYTES", 1 << 40)
    logits, labels = tensors(shape)
    with Client(both.addresses[1]) as client:
        result = client.compute_loss(FocalLoss(), logits, labels, gradients=True)
    request, answer = received
    gradient = result.gradients["inputs"]
    assert evaluated[-1][0] == lies_in(request, logits)
    assert address(gradient) == lies_in(answer, gradient)
