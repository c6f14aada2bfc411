"""The pool of buffers: memory comes back when its last reference is gone, and not before."""

import gc
import threading

import numpy as np
import pytest
import torch

from lossd_server.engine.buffers import BufferPool
from lossd_server.losses import EvaluationOptions, FocalLoss
from tests.domain.support import evaluated

MEBIBYTE = 1 << 20


def test_memory_is_used_again_once_nobody_holds_it():
    pool = BufferPool(64 * MEBIBYTE)
    first, second = (pool.allocate(3 * MEBIBYTE) for _ in range(2))
    place = first.ctypes.data
    assert second.ctypes.data != place
    del first
    assert pool.allocate(3 * MEBIBYTE).ctypes.data == place


def test_views_of_every_kind_hold_it():
    pool = BufferPool(64 * MEBIBYTE)
    tensor = torch.from_numpy(pool.allocate(2 * MEBIBYTE)).view(torch.float32)[8:].view(8, -1).t()
    array = tensor.numpy()[7:]
    view = memoryview(array)[7:]
    del array, tensor
    gc.collect()
    assert pool.idle_bytes == 0
    view.release()
    del view
    assert pool.idle_bytes == 2 * MEBIBYTE


def test_what_is_written_is_not_changed_by_later_requests():
    pool, rng = BufferPool(64 * MEBIBYTE), np.random.default_rng(0)
    held = []
    for number in range(40):
        buffer = pool.allocate(int(rng.integers(1, 6)) * MEBIBYTE)
        buffer.fill(number)
        held.append((number, buffer))
        if len(held) > 4:
            del held[int(rng.integers(len(held)))]
        assert all((kept == value).all() for value, kept in held)


def test_idle_memory_is_bounded_and_the_oldest_goes_first():
    pool = BufferPool(6 * MEBIBYTE)
    buffers = [pool.allocate(2 * MEBIBYTE) for _ in range(5)]
    while buffers:
        del buffers[0]
        assert pool.idle_bytes <= 6 * MEBIBYTE
    assert pool.idle_bytes == 6 * MEBIBYTE


def test_whoever_asks_for_more_has_what_was_idle_longest_let_go():
    pool = BufferPool(4 * MEBIBYTE)
    places = [buffer.ctypes.data for buffer in [pool.allocate(2 * MEBIBYTE) for _ in range(5)]]
    larger = pool.allocate(3 * MEBIBYTE)
    assert [block.ctypes.data for block in pool._blocks] == [*places[-2:], larger.ctypes.data]


def test_a_buffer_larger_than_the_bound_is_served_and_let_go():
    pool = BufferPool(2 * MEBIBYTE)
    assert len(pool.allocate(9 * MEBIBYTE)) == 9 * MEBIBYTE
    assert pool.idle_bytes == 0


def test_small_buffers_are_left_to_the_c_library():
    pool = BufferPool(64 * MEBIBYTE)
    assert [pool.allocate(size) for size in (0, 1, 1000)] == [None] * 3
    assert pool.idle_bytes == 0


def test_threads_may_share_one():
    pool, failures = BufferPool(16 * MEBIBYTE), []

    def use(number):
        for _ in range(50):
            buffer = pool.allocate(MEBIBYTE + number)
            buffer.fill(number)
            if not (buffer == number).all():
                failures.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_the_host_has_not_is_a_memory_error():
    pool = BufferPool(MEBIBYTE)
    with pytest.raises(MemoryError):
        pool.allocate(1 << 62)
    assert len(pool.allocate(MEBIBYTE)) == MEBIBYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_every_type_and_layout_lie_in_it(dtype, layout):
    pool, generator = BufferPool(64 * MEBIBYTE), torch.Generator().manual_seed(3)
    logits = torch.randn(2, 20, 128, 128, generator=generator).to(dtype).to(memory_format=layout)
    labels = torch.randint(-1, 20, (2, 128, 128), generator=generator)
    arguments = {"inputs": logits, "targets": labels}
    own = evaluated(FocalLoss(), arguments, EvaluationOptions(gradients=("inputs",)))
    pooled = evaluated(
        FocalLoss(), arguments, EvaluationOptions(gradients=("inputs",), allocate=pool.allocate)
    )
    gradient = pooled.gradients["inputs"]
    assert gradient.dtype is dtype
    assert gradient.stride() == own.gradients["inputs"].stride() == logits.stride()
    assert torch.equal(gradient, own.gradients["inputs"])
    assert pool.idle_bytes == 0
    del pooled, gradient
    assert pool.idle_bytes >= logits.nbytes
