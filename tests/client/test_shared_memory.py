"""Calls through shared memory: the same results, memory used again, and every way to have none."""

import asyncio
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd_client import (
    AsyncClient,
    Client,
    CustomLoss,
    DeadlineError,
    FCOSLoss,
    FocalLoss,
    InvalidInputError,
    _storage,
)
from lossd_client._shared_memory import pool
from lossd_client.torch import RemoteLoss
from lossd_server.losses import FocalLoss as LocalFocalLoss
from tests.client.sharing import is_shared, memory_files
from tests.client.support import FCOS, SIMPLE, same_bits
from tests.domain.regions import descriptor_count, wait_until
from tests.service import custom_modules
from tests.service.support import focal_grid_arrays, make_server

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("sockets") / "lossd.sock"
    load = ("tests.service.custom_modules:Held", *custom_modules.ALL)
    with make_server(listen=(f"unix:{path}", "127.0.0.1:0"), load=load) as running:
        yield running


@pytest.fixture
def target(both):
    return both.addresses[0]


@pytest.fixture
def client(target):
    with Client(target, timeout=60) as made:
        yield made


@pytest.fixture
def inline(target):
    with Client(target, timeout=60, shared_memory=False) as made:
        yield made


@pytest.fixture
def tiny(monkeypatch):
    """Sees to it that the smallest tensor is shared."""
    monkeypatch.setattr(_storage, "LEAST_BYTES", 1)


def grid(rows=100):
    arrays = focal_grid_arrays(np.random.default_rng(rows), rows)
    return np.tile(arrays["inputs"], (1, 1, 10, 10)), np.tile(arrays["targets"], (1, 10, 10))


LOGITS, LABELS = grid()


def flat(value):
    return value if isinstance(value, list) else [value]


def assert_same(result, expected):
    assert same_bits(result.loss, expected.loss)
    assert result.raw_sums == expected.raw_sums
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert isinstance(result.gradients[name], list) == isinstance(gradient, list)
        assert all(map(same_bits, flat(result.gradients[name]), flat(gradient)))


@pytest.mark.parametrize("name", [*SIMPLE, *FCOS])
def test_every_loss_gives_the_bits_of_inline(client, inline, tiny, name):
    case = {**SIMPLE, **FCOS}[name]
    items = [case.arguments(seed, n) for seed, n in enumerate((6, 1, 3))]
    results = client.compute_losses(case.config, items, gradients=True)
    for result, expected in zip(
        results, inline.compute_losses(case.config, items, gradients=True), strict=True
    ):
        assert_same(result, expected)
        for gradient in result.gradients.values():
            assert all(is_shared(client, array) for array in flat(gradient))


@pytest.mark.parametrize("gradient_dtype", [None, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16, ">f4", ">f8"])
def test_every_type_gives_the_bits_of_inline(client, inline, dtype, gradient_dtype):
    arguments = LOGITS.astype(dtype), LABELS
    options = {"gradients": True, "gradient_dtype": gradient_dtype}
    assert_same(
        client.compute_loss(FocalLoss(), *arguments, **options),
        inline.compute_loss(FocalLoss(), *arguments, **options),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, :, ::2],
        lambda a: a[::-1],
        np.asfortranarray,
        torch.from_numpy,
    ],
)
def test_inputs_of_every_form(client, inline, change):
    arguments = change(LOGITS), LABELS[:, :: 2 if change(LOGITS).shape != LOGITS.shape else 1]
    results = [c.compute_loss(FocalLoss(), *arguments, gradients=True) for c in (client, inline)]
    assert_same(*results)


def test_a_custom_loss_gives_the_bits_of_inline(client, inline, tiny):
    tensors = {"pred": LOGITS, "target": LOGITS / 2, "scale": None}
    del tensors["scale"]
    results = [c.compute_loss(CustomLoss("Squared"), tensors, gradients="pred") for c in (client, inline)]
    assert_same(*results)
    assert is_shared(client, results[0].gradients["pred"])


def test_in_a_torch_module(client):
    leaves = [torch.from_numpy(LOGITS.copy()).requires_grad_() for _ in range(2)]
    RemoteLoss(client, FocalLoss())(leaves[0], torch.from_numpy(LABELS)).backward()
    LocalFocalLoss()(leaves[1], torch.from_numpy(LABELS)).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_messages_carry_no_large_tensor(both, client, inline):
    def sent():
        value = both._metrics.registry.get_sample_value
        return [value(f"lossd_{way}_bytes_sum", {"method": "ComputeLoss"}) for way in ("request", "response")]

    before = sent()
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert all(after - first < 1000 for after, first in zip(sent(), before, strict=True))
    before = sent()
    inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert all(after - first > LOGITS.nbytes for after, first in zip(sent(), before, strict=True))


def test_small_tensors_go_inline(client):
    result = client.compute_loss(FocalLoss(), LOGITS[:1, :, :20, :20], LABELS[:1, :20, :20], gradients=True)
    assert not is_shared(client, result.gradients["inputs"])
    assert not client._sharing.pool()._regions


def test_over_tcp_nothing_is_shared(both):
    with Client(both.addresses[1]) as client:
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert not is_shared(client, result.gradients["inputs"])
        array = client.allocate(LOGITS.shape)
        array[:] = LOGITS
        assert client.compute_loss(FocalLoss(), array, LABELS).loss == result.loss


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


def test_an_allocated_array_is_sent_where_it_lies(client, inline, monkeypatch):
    logits = client.allocate(LOGITS.shape)
    labels = client.allocate(LABELS.shape, LABELS.dtype)
    logits[:], labels[:] = LOGITS, LABELS
    assert (logits.dtype, logits.flags.writeable) == (np.float32, True)
    copied = []
    monkeypatch.setattr(_storage.np, "copyto", lambda *arguments: copied.append(arguments))
    result = client.compute_loss(FocalLoss(), logits, labels, gradients=True)
    assert not copied
    monkeypatch.undo()
    assert_same(result, inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True))
    assert not np.shares_memory(result.gradients["inputs"], logits)


@pytest.mark.parametrize("change", [lambda a: a, torch.from_numpy, lambda a: a.reshape(-1).reshape(a.shape)])
def test_views_of_an_allocated_array_are_sent_where_they_lie(client, inline, change, monkeypatch):
    several = client.allocate((3, *LOGITS.shape))
    several[:] = LOGITS
    copied = []
    monkeypatch.setattr(_storage.np, "copyto", lambda place, array: copied.append(array.dtype))
    client.compute_loss(FocalLoss(), change(several[1]), np.zeros_like(LABELS), gradients=True)
    assert copied == [LABELS.dtype]


def test_a_gradient_may_be_an_input(client, inline):
    gradient = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True).gradients["inputs"]
    expected = inline.compute_loss(FocalLoss(), gradient.copy(), LABELS, gradients=True)
    assert_same(client.compute_loss(FocalLoss(), gradient, LABELS, gradients=True), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "f4"), (7, "f8"), ((2, 0), "i8"), ((3,), "O"), ((5, 5), ml_dtypes.bfloat16)]
)
def test_allocate_takes_what_numpy_takes(client, shape, dtype):
    array = client.allocate(shape, dtype)
    assert (array.shape, array.dtype) == (np.empty(shape, dtype).shape, np.dtype(dtype))


def test_allocate_refuses_what_numpy_refuses(client):
    with pytest.raises(ValueError, match="negative"):
        client.allocate((2, -1))
    with pytest.raises(TypeError):
        client.allocate((2,), "nothing")


def test_beyond_the_servers_limit_all_is_inline(tmp_path, monkeypatch, inline):
    monkeypatch.setattr(pool, "REGION_BYTES", MEBIBYTE)
    limit = 8 * MEBIBYTE
    expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), max_shared_bytes=limit) as server,
        Client(server.addresses[0]) as client,
    ):
        held = []
        for _ in range(5):
            held.append(client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True))
            assert_same(held[-1], expected)
        shared = [is_shared(client, result.gradients["inputs"]) for result in held]
        assert shared[0] != shared[-1]
        assert client.allocate((limit,)).nbytes == 4 * limit
        same = client.allocate((MEBIBYTE // 16, 16))
        assert len(client.compute_losses(FocalLoss(), [(same, np.zeros(len(same), np.int8))] * 6)) == 6
        assert server._sharing.regions.held_bytes <= limit


def test_a_server_that_shares_nothing(tmp_path):
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), max_shared_bytes=0) as server,
        Client(server.addresses[0]) as client,
    ):
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert not is_shared(client, result.gradients["inputs"])


def test_a_socket_that_takes_nothing(tmp_path, both):
    # The directory that the client knows the server's sockets by may be another, and may miss one.
    (tmp_path / "lossd.sock").symlink_to(both.addresses[0].removeprefix("unix:"))
    with Client(f"unix:{tmp_path / 'lossd.sock'}") as client:
        client._sharing.learn(client.server_info())
        client._sharing._path = str(tmp_path / "gone.shm")
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert not is_shared(client, result.gradients["inputs"])


def test_a_directory_that_the_server_knows_by_another_name(tmp_path, both):
    path = both.addresses[0].removeprefix("unix:")
    for name in ("lossd.sock", "lossd.sock.shm"):
        (tmp_path / name).symlink_to(path.replace("lossd.sock", name))
    with Client(f"unix://{tmp_path / 'lossd.sock'}") as client:
        info = client.server_info()
        client._sharing.learn(
            type(info)(
                **{f: getattr(info, f) for f in info.__slots__ if f != "shared_memory_socket"},
                shared_memory_socket="/elsewhere/lossd.sock.shm",
            )
        )
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert is_shared(client, result.gradients["inputs"])


def test_refused_input_says_what_it_says_inline(client, inline):
    messages = []
    for either in (client, inline):
        with pytest.raises(InvalidInputError) as caught:
            either.compute_loss(FocalLoss(), LOGITS, LABELS + 77, gradients=True)
        messages.append((str(caught.value), caught.value.field))
    assert messages[0] == messages[1]
    with pytest.raises(InvalidInputError) as caught:
        client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=["inputs", "CopyFrom", "targets"])
    assert caught.value.field == "gradients[1]"
    for dtype in ("c16", "O"):
        with pytest.raises(InvalidInputError, match="dtype"):
            client.compute_loss(FocalLoss(), LOGITS.astype(dtype), LABELS)
    gc.collect()
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert len(client._sharing.pool()._regions) == 1


@pytest.fixture
def held():
    """Lets `CustomLoss("Held")` run at last, whatever comes."""
    custom_modules.entered.clear()
    custom_modules.release.clear()
    yield
    custom_modules.release.set()


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
    wait_until(lambda: both._handlers.in_flight._count == 0)
    assert not np.array_equal(memory, before)  # nobody else's: only now was it written to
    assert (array == 7).all()
    del memory
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert region not in client._sharing.pool()._regions
    wait_until(
        lambda: both._sharing.regions.held_bytes == sum(r.size for r in client._sharing.pool()._regions)
    )


def test_a_region_that_the_server_lost_is_passed_again(both, client):
    array = client.allocate(LOGITS.shape)
    array[:] = LOGITS
    expected = client.compute_loss(FocalLoss(), array, LABELS, gradients=True)
    before = client._sharing.pool()._regions[0].region_id
    regions = both._sharing.regions
    with regions._lock:
        regions._mappings.clear()
    assert_same(client.compute_loss(FocalLoss(), array, LABELS, gradients=True), expected)
    assert client._sharing.pool()._regions[0].region_id != before
    assert is_shared(client, array)


def test_a_server_that_knows_no_region_at_last_gets_messages(both, client, monkeypatch):
    calls = []
    find = both._sharing.regions.find

    def forgetful(region_id):
        calls.append(region_id)
        return find(bytes(16))

    monkeypatch.setattr(both._sharing.regions, "find", forgetful)
    result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert len(set(calls)) == 2
    assert not is_shared(client, result.gradients["inputs"])


def test_an_answer_in_memory_that_was_not_given_is_an_error(client):
    from lossd.tensors import pack_shared
    from lossd.v1 import tensor_pb2
    from lossd.wire import Payloads
    from lossd_client import ServerError

    storage = _storage.Storage(None)
    stray = pack_shared(LOGITS, tensor_pb2.SharedSlice(region_id=bytes(16), offset=64))
    with pytest.raises(ServerError, match="not given"):
        storage.read(stray, Payloads())


def test_threads_share_one_client(client):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0)]
    expected = [client.compute_loss(FocalLoss(), logits, LABELS, gradients=True) for logits in inputs]

    def check(index):
        result = client.compute_loss(FocalLoss(), inputs[index % 4], LABELS, gradients=True)
        return np.array_equal(result.gradients["inputs"], expected[index % 4].gradients["inputs"])

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(check, range(60)))


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


def test_a_copy_shares_memory_or_not_as_its_original(target):
    for wanted in (True, False):
        with pickle.loads(pickle.dumps(Client(target, shared_memory=wanted))) as copy:  # noqa: S301
            result = copy.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
            assert is_shared(copy, result.gradients["inputs"]) == wanted


def test_a_channel_of_the_callers_is_not_asked(both, target):
    import grpc

    with grpc.insecure_channel(target) as channel:
        result = Client(target, channel=channel).compute_loss(
            FocalLoss(), LOGITS[:1, :, :50], LABELS[:1, :50], gradients=True
        )
    assert result.loss > 0


def test_asyncio(target, inline):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0)]

    async def run():
        async with AsyncClient(target) as client:
            array = await client.allocate(LOGITS.shape)
            array[:] = LOGITS
            calls = [client.compute_loss(FocalLoss(), x, LABELS, gradients=True) for x in (*inputs, array)]
            results = await asyncio.gather(*calls)
            assert all(is_shared(client, result.gradients["inputs"]) for result in results)
            return results

    for result, logits in zip(asyncio.run(run()), (*inputs, LOGITS), strict=True):
        assert_same(result, inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True))


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


def test_a_whole_head_goes_through_shared_memory(client, inline):
    rng = np.random.default_rng(3)
    sizes = ((64, 64), (32, 32), (1, 1), (0, 0))
    heads = [
        [rng.standard_normal((2, channels, *size), dtype=np.float32) for size in sizes]
        for channels in (80, 4, 1)
    ]
    heads[1] = [np.abs(level) * 8 for level in heads[1]]
    truth = [{"boxes": [[8.0, 8.0, 90.0, 70.0]], "labels": [3]}] * 2
    ranges = ((-1, 64), (64, 128), (128, 256), (256, 1e8))
    loss = FCOSLoss(num_classes=80, strides=(8, 16, 32, 64), regress_ranges=ranges)
    results = [c.compute_loss(loss, *heads, truth, gradients=True) for c in (client, inline)]
    assert_same(*results)
    assert all(is_shared(client, level) for level in results[0].gradients["cls_preds"] if level.size)


def test_a_stream_goes_through_shared_memory(client, inline):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0, 2.5)]
    results = []
    for result in client.compute_loss_stream(
        FocalLoss(), ((x, LABELS) for x in inputs), gradients=True, window=3
    ):
        assert is_shared(client, result.gradients["inputs"])
        results.append(result)
    for result, logits in zip(results, inputs, strict=True):
        assert_same(result, inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True))
    assert not any(region.is_retired for region in client._sharing.pool()._regions)


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


def test_asyncio_a_stream_goes_through_shared_memory(target, inline):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0)]

    async def run():
        async with AsyncClient(target) as client:
            stream = client.compute_loss_stream(FocalLoss(), [(x, LABELS) for x in inputs], gradients=True)
            results = [result async for result in stream]
            assert all(is_shared(client, result.gradients["inputs"]) for result in results)
            return results

    for result, logits in zip(asyncio.run(run()), inputs, strict=True):
        assert_same(result, inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True))
