"""How long memory is whose: results that are held, released and given up."""

import asyncio
import gc
import pickle

import numpy as np
import pytest

from lossd_client import (
    AsyncClient,
    Client,
    CustomLoss,
    DeadlineError,
    FocalLoss,
    InvalidInputError,
)
from tests.client.shared.support import LABELS, LOGITS, assert_same, is_shared, memory_files
from tests.domain.regions import descriptor_count, wait_until
from tests.service import custom_modules


def test_results_are_valid_as_long_as_they_are_held(client):
    first = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    kept = first.gradients["inputs"].copy()
    others = [client.compute_loss(FocalLoss(), LOGITS * n, LABELS, gradients=True) for n in range(2, 8)]
    assert np.array_equal(first.gradients["inputs"], kept)
    assert len({other.gradients["inputs"].ctypes.data for other in others}) == 6


def test_an_array_outlives_its_result(client):
    array = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True).gradients["inputs"][0]
    kept = array.copy()
    for n in range(2, 8):
        client.compute_loss(FocalLoss(), LOGITS * n, LABELS, gradients=True)
    assert np.array_equal(array, kept)


def test_memory_is_used_again(both, client):
    for _ in range(30):
        client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert len(client._sharing.pool()._regions) == 1


def test_gradients_are_read_only(client):
    gradient = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True).gradients["inputs"]
    with pytest.raises(ValueError, match="read-only"):
        gradient[0] = 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_released_result_gives_no_gradient(target, shared):
    with Client(target, shared_memory=shared) as client:
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        taken = result.gradients["inputs"]
        kept = taken.copy()
        result.release()
        for use in (
            lambda g: g["inputs"],
            len,
            list,
            lambda g: "inputs" in g,
            lambda g: g.keys() == {"inputs"},
        ):
            with pytest.raises(RuntimeError, match="released"):
                use(result.gradients)
        assert "released" in repr(result)
        assert result.loss > 0
        result.release()
        client.compute_loss(FocalLoss(), LOGITS * 3, LABELS, gradients=True)
        assert np.array_equal(taken, kept)


def test_release_gives_memory_back(client):
    result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    address = result.gradients["inputs"].ctypes.data
    result.release()
    again = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert again.gradients["inputs"].ctypes.data == address


def test_results_can_be_pickled(client):
    result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    copy = pickle.loads(pickle.dumps(result))  # noqa: S301
    assert_same(copy, result)
    assert not is_shared(client, copy.gradients["inputs"])


def test_memory_of_a_call_that_was_given_up_is_not_used_again(both, client, held):
    with pytest.raises(DeadlineError):
        client.compute_loss(CustomLoss("Held"), {"pred": LOGITS}, gradients=True, timeout=1)
    assert custom_modules.entered.is_set()
    (region,) = client._sharing.pool()._regions
    array = client.allocate(LOGITS.shape)
    array[:] = 7
    assert region.is_retired
    assert not region.address <= array.ctypes.data < region.address + region.size
    memory = region.array(0, (region.size,), np.dtype("u1"))
    before = memory.copy()
    custom_modules.release.set()
    wait_until(lambda: both._admission._unanswered == 0)
    assert not np.array_equal(memory, before)  # nobody else's: only now was it written to
    assert (array == 7).all()
    del memory
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert region not in client._sharing.pool()._regions
    wait_until(
        lambda: both._sharing.regions.held_bytes == sum(r.size for r in client._sharing.pool()._regions)
    )


def test_a_closed_client_shares_anew(both, client):
    result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    client.close()
    wait_until(lambda: both._sharing.regions.count == 0)
    again = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert np.array_equal(again.gradients["inputs"], result.gradients["inputs"])
    assert is_shared(client, again.gradients["inputs"])
    assert not is_shared(client, result.gradients["inputs"])


def test_a_client_that_was_not_closed_leaves_nothing(both, target):
    wait_until(lambda: both._sharing.regions.count == 0)
    before = descriptor_count()
    client = Client(target)
    gradient = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True).gradients["inputs"]
    del client
    gc.collect()
    wait_until(lambda: both._sharing.regions.count == 0)
    assert gradient.any()
    del gradient
    wait_until(lambda: descriptor_count() <= before)
    assert memory_files() == 0


def test_asyncio_a_call_that_is_cancelled_leaves_its_memory_alone(target, held):
    async def run():
        async with AsyncClient(target) as client:
            loss, arguments = CustomLoss("Held"), {"pred": LOGITS}
            call = asyncio.create_task(client.compute_loss(loss, arguments, gradients=True))
            await asyncio.to_thread(custom_modules.entered.wait, 30)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            (region,) = client._sharing.pool()._regions
            assert region.is_retired
            custom_modules.release.set()
            return await client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)

    assert asyncio.run(run()).loss > 0


def test_what_is_refused_on_a_stream_gives_its_memory_back(client):
    items = [(LOGITS, LABELS + (77 if i % 2 else 0)) for i in range(20)]
    outcomes = list(client.compute_loss_stream(FocalLoss(), items, gradients=True, return_exceptions=True))
    assert [isinstance(outcome, InvalidInputError) for outcome in outcomes] == [False, True] * 10
    assert outcomes[3].field == "items[3].focal.targets"
    del outcomes
    client.allocate(())
    (region,) = client._sharing.pool()._regions
    assert (len(region.stretches._used), region.is_retired) == (1, False)


def test_a_stream_that_is_left_keeps_off_its_memory(client, held):
    items = [(FocalLoss(), LOGITS)] * 3
    stream = client.compute_loss_stream(
        CustomLoss("Held"), ([{"pred": x}] for _, x in items), gradients=True, timeout=1
    )
    with pytest.raises(DeadlineError):
        next(stream)
    assert custom_modules.entered.is_set()
    regions = list(client._sharing.pool()._regions)
    assert all(region.is_retired for region in regions)
    custom_modules.release.set()
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    gc.collect()
    client.allocate(())
    assert not set(regions) & set(client._sharing.pool()._regions)
