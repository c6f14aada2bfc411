"""Memory that the client shares: never handed out twice, given back when nobody refers to it."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossd_client._shared_memory import pool
from lossd_client._shared_memory.allocator import Allocator
from lossd_client._shared_memory.pool import Pool
from lossd_server.shared_memory import Regions
from tests.domain.regions import descriptor_count, started, wait_until

FLOAT = np.dtype("<f4")
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def small_regions(monkeypatch):
    monkeypatch.setattr(pool.Region, "step", MEBIBYTE)


@pytest.fixture
def held():
    return Regions(max_bytes=4 * MEBIBYTE, max_total_bytes=8 * MEBIBYTE)


@pytest.fixture
def listening(tmp_path, held):
    made = started(str(tmp_path / "shm"), held)
    yield made
    made.stop()


@pytest.fixture
def shared(listening):
    made = Pool(listening.path, 4 * MEBIBYTE)
    yield made
    made.close()


def allocate(made, count, *shape):
    found = made.allocate((count, *shape), FLOAT)
    return None if found is None else found.array


def seen_by_server(held, found):
    mapping = held.find(found.region_id)
    return np.ndarray(found.array.shape, found.array.dtype, buffer=mapping, offset=found.offset)


steps = st.lists(st.tuples(st.booleans(), st.integers(0, 500)), max_size=60)


@given(st.integers(0, 2048), steps)
def test_stretches_never_overlap_and_come_back_whole(size, wanted):
    size *= 4
    stretches, out = Allocator(size), {}
    for giving_back, number in wanted:
        if giving_back and out:
            offset = sorted(out)[number % len(out)]
            del out[offset]
            stretches.free(offset)
            continue
        offset = stretches.allocate(number)
        if offset is None:
            continue
        assert offset % 64 == 0
        assert offset + max(number, 1) <= size
        for start, length in out.items():
            assert offset + max(number, 1) <= start or start + max(length, 1) <= offset
        out[offset] = number
    for offset in out:
        stretches.free(offset)
    assert stretches.is_unused
    assert size < 64 or stretches.allocate(size // 64 * 64) == 0


@given(st.lists(st.integers(1, 300), min_size=1))
def test_what_is_free_is_found(lengths):
    rounded = [-(-length // 64) * 64 for length in lengths]
    stretches = Allocator(sum(rounded))
    assert None not in [stretches.allocate(length) for length in lengths]
    assert stretches.allocate(1) is None


def test_an_array_lies_where_the_server_sees_it(shared, held):
    array = allocate(shared, 3, 5)
    array[:] = np.arange(15).reshape(3, 5)
    assert (array.dtype, array.shape, array.flags.c_contiguous) == (FLOAT, (3, 5), True)
    assert np.array_equal(seen_by_server(held, shared.find(array)), array)


def test_views_are_found_where_they_can_be_slices(shared, held):
    array = allocate(shared, 8, 16)
    array[:] = np.arange(128).reshape(8, 16)
    assert shared.find(array[2:5]).offset == shared.find(array).offset + 2 * 64
    assert np.array_equal(seen_by_server(held, shared.find(array[2:5])), array[2:5])
    assert shared.find(array.reshape(4, 2, 16)) is not None
    assert shared.find(array[:, 1:]) is None
    assert shared.find(array.T) is None
    assert shared.find(array.ravel()[1:]) is None
    assert shared.find(np.zeros((8, 16), np.float32)) is None


def test_memory_is_used_again_once_nothing_refers_to_it(shared):
    array = allocate(shared, 100)
    address = array.ctypes.data
    view = array[10:].view(np.int32).reshape(9, 10)
    del array
    gc.collect()
    assert allocate(shared, 100).ctypes.data != address
    del view
    again = allocate(shared, 100)
    assert again.ctypes.data == address


@pytest.mark.parametrize("keep", [memoryview, lambda a: a.__array_interface__ and a.data, np.asarray, iter])
def test_whatever_holds_an_array_holds_its_memory(shared, keep):
    kept = keep(allocate(shared, 100))
    other = allocate(shared, 100)
    other[:] = 7
    assert next(iter(kept)) == 0


def test_a_torch_tensor_holds_the_memory(shared):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(allocate(shared, 100))
    allocate(shared, 100)[:] = 7
    assert not tensor.any()
    assert shared.find(tensor.numpy()) is not None


def test_regions_grow_with_need_and_are_reused(shared, held):
    for _ in range(20):
        arrays = [allocate(shared, MEBIBYTE // 8) for _ in range(4)]
        assert all(array is not None for array in arrays)
        del arrays
    assert (held.count, held.held_bytes) == (2, 2 * MEBIBYTE)


def test_large_arrays_get_regions_of_their_own(shared, held):
    array = allocate(shared, MEBIBYTE // 2)
    assert array.nbytes == 2 * MEBIBYTE
    assert held.held_bytes == 2 * MEBIBYTE


def test_what_the_server_takes_is_what_there_is(shared, held):
    arrays = [allocate(shared, MEBIBYTE // 4) for _ in range(5)]
    assert [array is None for array in arrays] == [False] * 4 + [True]
    assert held.held_bytes == 4 * MEBIBYTE


def test_unused_regions_make_room_for_a_larger_one(shared, held):
    small = [allocate(shared, MEBIBYTE // 4) for _ in range(3)]
    assert allocate(shared, MEBIBYTE) is None
    del small
    assert allocate(shared, MEBIBYTE) is not None
    assert held.held_bytes == 4 * MEBIBYTE


def test_a_pool_that_believes_in_more_than_there_is(listening):
    greedy = Pool(listening.path, 1 << 40)
    arrays = [allocate(greedy, MEBIBYTE // 4) for _ in range(6)]
    assert [array is None for array in arrays] == [False] * 4 + [True] * 2
    arrays[0][:] = 1
    greedy.close()


def test_nobody_listens(tmp_path):
    alone = Pool(str(tmp_path / "none"), MEBIBYTE)
    assert allocate(alone, 5) is None
    assert not alone.renew([])


def test_retired_memory_is_not_used_again_and_goes_when_it_is_free(shared, held):
    given_up, kept = allocate(shared, 100), allocate(shared, 100)
    shared.retire([given_up])
    kept[:] = 5
    later = allocate(shared, 100)
    assert shared.find(later).region_id != shared.find(given_up).region_id
    assert shared.find(kept) is not None
    del given_up
    assert (allocate(shared, 100) is None, held.count) == (False, 2)
    del kept
    allocate(shared, 100)
    assert held.count == 1


def test_regions_that_the_server_lost_are_passed_anew(shared, held):
    array = allocate(shared, 100)
    array[:] = 3
    before = shared.find(array).region_id
    held._mappings.clear()
    assert shared.renew([before])
    after = shared.find(array)
    assert after.region_id != before
    assert np.array_equal(seen_by_server(held, after), array)
    assert shared.renew([before])  # another thread was sooner
    assert shared.find(array).region_id == after.region_id


def test_a_server_that_is_gone_takes_nothing(shared, listening):
    array = allocate(shared, 100)
    array[:] = 3
    listening.stop()
    assert allocate(shared, MEBIBYTE // 4) is None
    assert shared.find(array) is None
    assert array.sum() == 300
    assert allocate(shared, 100) is None


def test_a_restart_is_noticed_before_the_next_call(shared, listening, held):
    array = allocate(shared, 100)
    before = shared.find(array).region_id
    listening.stop()
    again = started(listening.path, held)
    after = shared.find(array)
    assert after.region_id != before
    assert len(held.find(after.region_id)) == MEBIBYTE
    shared.close()
    again.stop()


def test_a_server_that_was_missed_for_a_while_is_looked_for_now_and_then(shared, listening, held):
    array = allocate(shared, 100)
    listening.stop()
    assert shared.find(array) is None
    again = started(listening.path, held)
    assert shared.find(array) is None
    shared._next_try = 0.0  # as if a second had passed
    assert len(held.find(shared.find(array).region_id)) == MEBIBYTE
    shared.close()
    again.stop()


def test_a_closed_pool_leaves_its_arrays(shared, held):
    array = allocate(shared, 100)
    array[:] = 3
    shared.close()
    wait_until(lambda: held.count == 0)
    assert (array.sum(), shared.find(array)) == (300, None)
    assert allocate(shared, 100) is not None


def test_nothing_is_left_of_a_pool(listening, held):
    before = descriptor_count()
    made = Pool(listening.path, 4 * MEBIBYTE)
    arrays = [allocate(made, MEBIBYTE // 4) for _ in range(3)]
    made.close()
    del made, arrays
    gc.collect()
    wait_until(lambda: descriptor_count() <= before)
    assert (held.count, held.held_bytes) == (0, 0)
    assert "memfd:lossd" not in Path("/proc/self/maps").read_text()


def test_threads_never_get_the_same_memory(shared):
    failures = []

    def work(number):
        for _ in range(200):
            arrays = [allocate(shared, 50) for _ in range(3)]
            for array in arrays:
                array[:] = number
            if any((array != number).any() for array in arrays):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_lets_go_of_what_is_its_parents(shared, held, listening):
    array = allocate(shared, 100)
    array[:] = 3
    waiting, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(waiting, 1)
        os._exit(0 if array.sum() == 300 else 1)
    shared.close()
    wait_until(lambda: held.count == 0)  # though the child had the connection open too
    os.write(go_on, b".")
    assert os.waitpid(child, 0)[1] == 0
    os.close(waiting)
    os.close(go_on)
