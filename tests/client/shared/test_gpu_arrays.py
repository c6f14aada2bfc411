"""Arrays in memory of the server's GPU, which both sides have open: with a stand-in for the driver."""

import asyncio
import gc
import os

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd import gpu_memory
from lossd.gpu_memory import GRANULARITY, GpuArray, GpuMemory
from lossd_client import AsyncClient, Client, CustomLoss, FCOSLoss, FocalLoss, InvalidInputError
from lossd_client._shared_memory.pool import Pool
from lossd_client.torch import RemoteLoss
from lossd_server.engine import transfer
from lossd_server.rpc import server as rpc_server
from lossd_server.shared_memory import Regions
from tests import stand_in_gpu
from tests.client.shared.support import LABELS, LOGITS
from tests.domain.regions import wait_until
from tests.service import custom_modules
from tests.service.support import make_server
from tests.stand_in_gpu import StandIn, numbers_of


@pytest.fixture
def gpu(monkeypatch):
    """One GPU, which client and server see."""
    made = StandIn()
    monkeypatch.setattr(gpu_memory, "driver", lambda: made)
    monkeypatch.setattr("lossd_client._shared_memory.pool.driver", lambda: made)
    monkeypatch.setattr(transfer, "on_gpu", stand_in_gpu.tensor_of)
    monkeypatch.setattr("lossd_client.torch._tensor_of", _tensor_of)
    monkeypatch.setattr(rpc_server, "Regions", lambda **limits: Regions(**{**limits, "gpu": 0}))
    return made


def _tensor_of(array):
    return stand_in_gpu.tensor_of(array) if isinstance(array, GpuArray) else torch.from_numpy(array)


@pytest.fixture
def target(gpu, tmp_path):
    with make_server(listen=(f"unix:{tmp_path}/lossd.sock",), load=custom_modules.ALL) as running:
        yield running.addresses[0]


def on_gpu(client, values):
    values = np.asarray(values)
    array = client.allocate_on_gpu(values.shape, values.dtype)
    numbers_of(array)[...] = values
    return array


def test_a_prediction_is_read_and_its_gradient_written_where_they_lie(client, inline, gpu):
    logits = on_gpu(client, LOGITS)
    before = gpu.waits
    result = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True)
    gradient = result.gradients["inputs"]
    assert isinstance(gradient, GpuArray)
    assert gpu.waits > before
    expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    np.testing.assert_array_equal(gradient.numpy(), expected.gradients["inputs"])
    assert result.loss == expected.loss
    np.testing.assert_array_equal(logits.numpy(), LOGITS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_every_type_goes(client, inline, dtype):
    logits = LOGITS.astype(dtype)
    result = client.compute_loss(FocalLoss(), on_gpu(client, logits), LABELS, gradients=True)
    expected = inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True)
    assert result.gradients["inputs"].dtype == dtype
    np.testing.assert_array_equal(result.gradients["inputs"].numpy(), expected.gradients["inputs"])


def test_levels_and_many_items_go(client, inline):
    rng = np.random.default_rng(0)
    sizes = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
    maps = [[rng.normal(size=(1, n, *s)).astype("f4") for s in sizes] for n in (3, 4, 1)]
    truth = [{"boxes": [[4.0, 4.0, 40.0, 40.0]], "labels": [1]}]
    there = [[on_gpu(client, level) for level in kind] for kind in maps]
    batch = [(*there, truth), (*maps, truth)]
    ours = client.compute_losses(FCOSLoss(3), batch, gradients=True)
    theirs = inline.compute_losses(FCOSLoss(3), [(*maps, truth)] * 2, gradients=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.loss == other.loss
        for name, levels in other.gradients.items():
            for found, expected in zip(mine.gradients[name], levels, strict=True):
                on_host = found.numpy() if isinstance(found, GpuArray) else found
                np.testing.assert_array_equal(on_host, expected)
    assert isinstance(ours[0].gradients["cls_preds"][0], GpuArray)


def test_targets_on_the_gpu_are_sent_from_the_host(client, inline):
    result = client.compute_loss(FocalLoss(), on_gpu(client, LOGITS), on_gpu(client, LABELS), gradients=True)
    assert result.loss == inline.compute_loss(FocalLoss(), LOGITS, LABELS).loss


def test_a_custom_loss_reads_and_writes_there_too(client, inline):
    rng = np.random.default_rng(1)
    pred, target = rng.normal(size=(2, 4, 4)).astype("f4")
    both = [{"pred": place, "target": target} for place in (on_gpu(client, pred), pred)]
    ours, theirs = (
        each.compute_loss(CustomLoss("Squared"), values, gradients=["pred"])
        for each, values in zip((client, inline), both, strict=True)
    )
    np.testing.assert_array_equal(ours.gradients["pred"].numpy(), theirs.gradients["pred"])


def test_nothing_in_use_is_written_to_and_nothing_stays_mapped(client, gpu):
    logits = on_gpu(client, LOGITS)
    first = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True).gradients["inputs"]
    before = first.numpy()
    second = client.compute_loss(FocalLoss(alpha=0.9), logits, LABELS, gradients=True).gradients["inputs"]
    np.testing.assert_array_equal(first.numpy(), before)
    address = second.address
    del second
    third = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True).gradients["inputs"]
    assert third.address == address
    del first, third, logits
    client.close()
    gc.collect()
    wait_until(lambda: not gpu.mapped)


def test_memory_is_passed_anew_to_a_server_that_was_restarted(gpu, tmp_path, inline):
    listen = (f"unix:{tmp_path}/again.sock",)
    with Client(listen[0]) as client:
        with make_server(listen=listen):
            logits = on_gpu(client, LOGITS)
            client.compute_loss(FocalLoss(), logits, LABELS)
        with make_server(listen=listen):
            result = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True)
            assert isinstance(result.gradients["inputs"], GpuArray)
            assert_same_numbers(result, inline)


def assert_same_numbers(result, inline):
    expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    np.testing.assert_array_equal(result.gradients["inputs"].numpy(), expected.gradients["inputs"])


def test_of_an_array_that_the_server_does_not_have_a_copy_is_sent(client, inline, tmp_path):
    expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    with (
        make_server(listen=(f"unix:{tmp_path}/other.sock",)) as other,
        Client(other.addresses[0]) as stranger,
    ):
        logits = on_gpu(stranger, LOGITS)
    for each in (client, inline):
        result = each.compute_loss(FocalLoss(), logits, LABELS, gradients=True)
        np.testing.assert_array_equal(result.gradients["inputs"], expected.gradients["inputs"])


def test_a_narrow_wire_takes_a_copy(client, inline):
    ours = client.compute_loss(FocalLoss(), on_gpu(client, LOGITS), LABELS, wire_dtype="float16")
    assert ours.loss == inline.compute_loss(FocalLoss(), LOGITS, LABELS, wire_dtype="float16").loss


def test_without_a_gpu_in_common_there_is_none(target, monkeypatch):
    monkeypatch.setattr(stand_in_gpu.StandIn, "uuids", lambda _self: ["ff" * 16])
    with Client(target) as client:
        assert client.server_info().shared_gpu == stand_in_gpu.UUID
        assert client.allocate_on_gpu((4,)) is None
        assert client.allocate((4,)).shape == (4,)


def test_without_room_or_shared_memory_there_is_none(target):
    with Client(target, shared_memory=False) as client:
        assert client.allocate_on_gpu((4,)) is None
    with Client(target) as client:
        assert client.allocate_on_gpu((1 << 50,)) is None
        assert client.allocate_on_gpu((4,)) is not None


def test_asyncio_has_it_too(target):
    async def run():
        async with AsyncClient(target) as client:
            logits = await client.allocate_on_gpu(LOGITS.shape)
            numbers_of(logits)[...] = LOGITS
            return await client.compute_loss(FocalLoss(), logits, LABELS, gradients=True)

    assert isinstance(asyncio.run(run()).gradients["inputs"], GpuArray)


def test_a_stream_has_it_too(client, inline):
    items = [(on_gpu(client, LOGITS), LABELS)] * 3
    expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS).loss
    results = list(client.compute_loss_stream(FocalLoss(), items, gradients=True))
    assert [result.loss for result in results] == [expected] * 3


class OnTheGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True

    def get_device(self):
        return 0


def test_a_module_takes_its_predictions_there(client, monkeypatch):
    shared = []
    allocate = Client.allocate_on_gpu

    def counted(self, *arguments, **settings):
        shared.append(allocate(self, *arguments, **settings))
        return shared[-1]

    monkeypatch.setattr(Client, "allocate_on_gpu", counted)
    logits = torch.from_numpy(LOGITS.copy()).as_subclass(OnTheGpu).requires_grad_()
    local = torch.from_numpy(LOGITS.copy()).requires_grad_()
    RemoteLoss(client, FocalLoss())(logits, torch.from_numpy(LABELS)).backward()
    assert len(shared) == 1
    monkeypatch.undo()
    RemoteLoss(client, FocalLoss())(local, torch.from_numpy(LABELS)).backward()
    torch.testing.assert_close(logits.grad.as_subclass(torch.Tensor), local.grad, rtol=0, atol=0)


def test_a_pool_without_a_gpu_waits_for_none(tmp_path):
    Pool(str(tmp_path / "nowhere"), 1 << 20).wait_for_gpu()


def test_what_is_shared_says_what_it_is(client):
    array = client.allocate_on_gpu((2, 3))
    assert repr(array) == "GpuArray(shape=(2, 3), dtype=float32, gpu=0)"
    assert array.__cuda_array_interface__["typestr"] == "<f4"
    assert len(array) == 2
    assert not hasattr(client.allocate_on_gpu((2,), ml_dtypes.bfloat16), "__cuda_array_interface__")
    assert client.allocate_on_gpu((2,), ml_dtypes.bfloat16).bits.__cuda_array_interface__["typestr"] == "<i2"
    assert client.allocate_on_gpu((0,)).numpy().shape == (0,)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_leaves_the_memory_to_its_parent(gpu):
    memory, descriptor = GpuMemory.create(0, GRANULARITY)
    os.close(descriptor)
    child = os.fork()
    if child == 0:
        del memory
        os._exit(0 if len(gpu.mapped) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del memory
    assert not gpu.mapped


def test_bits_keep_the_memory_of_their_array(client):
    array = client.allocate_on_gpu((4096,), ml_dtypes.bfloat16)
    address, bits = array.address, array.bits
    del array
    assert client.allocate_on_gpu((4096,)).address != address
    del bits
    assert client.allocate_on_gpu((4096,)).address == address


def test_strict_looks_at_what_lies_on_the_gpu(client):
    logits = on_gpu(client, np.where(LOGITS.max() == LOGITS, np.float32(np.nan), LOGITS))
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        client.compute_loss(FocalLoss(), logits, LABELS, strict=True)


def test_more_than_a_request_may_name_is_sent(gpu, tmp_path, inline):
    listen = (f"unix:{tmp_path}/small.sock",)
    most = 4 * GRANULARITY
    with make_server(listen=listen, max_shared_bytes=most), Client(listen[0]) as client:
        logits = on_gpu(client, LOGITS)
        items = [(logits, LABELS)] * (1 + most // logits.nbytes)
        found = client.compute_losses(FocalLoss(), items, gradients=True)
        expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS)
        assert {float(result.loss) for result in found} == {float(expected.loss)}


def test_another_gpu_than_the_servers_is_left_alone(client):
    assert client.allocate_on_gpu((4,), gpu=1) is None
    assert client.allocate_on_gpu((4,), gpu=0) is not None


@pytest.mark.parametrize(("shape", "dtype"), [((-1,), "f4"), ((2,), object)])
def test_what_no_gpu_holds_is_refused(client, shape, dtype):
    with pytest.raises(ValueError, match="there is no array of"):
        client.allocate_on_gpu(shape, dtype)


def test_who_wants_no_gpu_asks_no_driver(target, monkeypatch):
    def nothing():
        raise AssertionError("asked")

    monkeypatch.setattr(gpu_memory, "driver", nothing)
    with Client(target) as client:
        assert client.compute_loss(FocalLoss(), np.tile(LOGITS, (1, 1, 8, 8)), np.tile(LABELS, (1, 8, 8)))
