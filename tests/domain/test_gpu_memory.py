"""Regions of a GPU's memory: what is taken, refused, and let go; with a stand-in for the driver."""

import gc
import os

import ml_dtypes
import numpy as np
import pytest

from lossd import gpu_memory
from lossd.gpu_memory import GRANULARITY, GpuArray, GpuMemory, GpuMemoryError
from lossd.shared_memory import Answer, Frame, Request
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.shared_memory import Regions, Slices
from lossd_server.shared_memory.mapping import RefusedError
from lossd_server.shared_memory.regions import Owner
from tests.domain.regions import Peer, memory_file, memory_file_count, started, wait_until
from tests.stand_in_gpu import UUID, StandIn, numbers_of

FLOAT = np.dtype("<f4")


@pytest.fixture
def gpu(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(gpu_memory, "driver", lambda: made)
    return made


@pytest.fixture
def held(gpu):
    return Regions(max_bytes=4 * GRANULARITY, max_total_bytes=4 * GRANULARITY, gpu=0)


@pytest.fixture
def exported(gpu):
    """A caller's memory, and the descriptor that it passes."""
    memory, descriptor = GpuMemory.create(0, GRANULARITY)
    yield memory, descriptor
    os.close(descriptor)


def test_a_region_is_the_callers_memory_until_nobody_uses_it(held, exported, gpu):
    memory, descriptor = exported
    owner = Owner()
    region_id = held.add(owner, descriptor, GRANULARITY, on_gpu=True)
    array = Slices(held).read(region_id, 64, FLOAT, (3,), in_place=True)
    assert isinstance(array, GpuArray)
    numbers_of(GpuArray(memory, 64, (3,), FLOAT))[:] = [1, 2, 3]
    assert array.numpy().tolist() == [1, 2, 3]
    held.release(owner, region_id)
    gc.collect()
    assert (held.held_bytes, len(gpu.mapped)) == (GRANULARITY, 2)
    del array
    gc.collect()
    assert (held.held_bytes, len(gpu.mapped)) == (0, 1)


def test_what_is_checked_is_a_copy_on_the_host(held, exported):
    memory, descriptor = exported
    region_id = held.add(Owner(), descriptor, GRANULARITY, on_gpu=True)
    there = numbers_of(GpuArray(memory, 0, (2,), np.dtype(np.int64)))
    there[:] = [3, 4]
    copy = Slices(held).read(region_id, 0, np.dtype(np.int64), (2,), in_place=False)
    there[:] = 9
    assert copy.tolist() == [3, 4]
    assert not copy.flags.writeable


def test_slices_of_a_gpu_lie_inside_and_do_not_overlap(held, exported):
    region_id = held.add(Owner(), exported[1], GRANULARITY, on_gpu=True)
    slices = Slices(held)
    with pytest.raises(InvalidInputError) as caught:
        slices.read(region_id, GRANULARITY - 64, FLOAT, (17,), in_place=True)
    assert caught.value.reason is Reason.INVALID_SLICE
    slices.read(region_id, 0, FLOAT, (32,), in_place=True)
    written = slices.write("outputs[0]", region_id, 64, np.dtype(ml_dtypes.bfloat16), (8,))
    assert (written.nbytes, written.dtype) == (16, ml_dtypes.bfloat16)
    with pytest.raises(InvalidInputError, match="overlaps"):
        slices.check_overlaps()


@pytest.mark.parametrize(
    ("size", "answer"),
    [
        (0, Answer.WRONG_SIZE),
        (-GRANULARITY, Answer.WRONG_SIZE),
        (GRANULARITY + 1, Answer.WRONG_SIZE),
        (2 * GRANULARITY, Answer.NOT_MAPPABLE),
        (8 * GRANULARITY, Answer.TOO_LARGE),
    ],
)
def test_another_size_than_that_of_the_memory_is_refused(held, exported, gpu, size, answer):
    with pytest.raises(RefusedError) as caught:
        held.add(Owner(), exported[1], size, on_gpu=True)
    assert caught.value.answer is answer
    assert (held.held_bytes, len(gpu.mapped)) == (0, 1)


def test_a_descriptor_of_anything_else_is_refused(held):
    with memory_file(GRANULARITY) as descriptor, pytest.raises(RefusedError) as caught:
        held.add(Owner(), descriptor, GRANULARITY, on_gpu=True)
    assert caught.value.answer is Answer.NOT_MAPPABLE


def test_a_listener_takes_both_kinds_or_says_that_it_has_no_gpu(held, exported, tmp_path):
    ask = Frame(code=Request.PASS_GPU, size=GRANULARITY).to_bytes()
    without = Regions(max_bytes=GRANULARITY, max_total_bytes=GRANULARITY)
    for regions, expected in ((held, Answer.DONE), (without, Answer.NO_GPU)):
        listening = started(str(tmp_path / "shm"), regions)
        try:
            with Peer(listening.path) as peer:
                assert peer.ask(ask, [exported[1]]).code is expected
                with memory_file(GRANULARITY) as descriptor:
                    assert peer.ask(ask, [descriptor]).code in {Answer.NOT_MAPPABLE, Answer.NO_GPU}
                    assert peer.pass_region(descriptor, GRANULARITY).code is Answer.DONE
                assert peer.ask(ask).code is Answer.MALFORMED
            wait_until(lambda regions=regions: regions.held_bytes == 0)
        finally:
            listening.stop()


def test_a_gpu_that_cannot_pass_memory_on_shares_none(gpu, monkeypatch):
    assert Regions(max_bytes=1, max_total_bytes=1, gpu=0).gpu_uuid == UUID
    monkeypatch.setattr(StandIn, "uuids", lambda _self: [""])
    regions = Regions(max_bytes=GRANULARITY, max_total_bytes=GRANULARITY, gpu=0)
    assert regions.gpu_uuid == ""
    with pytest.raises(RefusedError) as caught:
        regions.add(Owner(), 0, GRANULARITY, on_gpu=True)
    assert caught.value.answer is Answer.NO_GPU


def test_a_handle_is_let_go_whatever_becomes_of_it(gpu, exported, monkeypatch):
    def no_room(*_arguments):
        raise GpuMemoryError(2, "cuMemAddressReserve: out of memory")

    before = memory_file_count()
    monkeypatch.setattr(StandIn, "map", no_room)
    with pytest.raises(GpuMemoryError, match="out of memory"):
        GpuMemory.create(0, GRANULARITY)
    with pytest.raises(GpuMemoryError):
        GpuMemory.open(0, exported[1], GRANULARITY)
    assert memory_file_count() == before


def test_without_a_driver_nothing_is_shared(monkeypatch):
    def nothing():
        raise GpuMemoryError("there is no CUDA driver")

    monkeypatch.setattr(gpu_memory, "driver", nothing)
    assert gpu_memory.uuid_of(0) == ""
    assert gpu_memory.ordinal_of(UUID) is None
    assert Regions(max_bytes=1, max_total_bytes=1, gpu=0).gpu_uuid == ""
