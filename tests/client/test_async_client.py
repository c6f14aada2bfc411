"""The client for asyncio: the same facts as for the synchronous one."""

import asyncio

import grpc
import numpy as np
import pytest

from lossd_client import (
    AsyncClient,
    CenternessLoss,
    Client,
    CustomLoss,
    DeadlineError,
    FCOSAssigner,
    FocalLoss,
    InvalidInputError,
    NotFoundError,
    ServerError,
    TooLargeError,
    UnavailableError,
)
from lossd_client._options import EvaluationOptions, LossOptions
from tests.client.support import FCOS, SIMPLE, same_bits
from tests.service import custom_modules
from tests.service.support import focal_arrays, make_server, scene

LOGITS, LABELS = np.zeros((2, 3), np.float32), np.array([0, 2])
PRED = {"pred": np.ones((2, 3), np.float32)}


def focal(n, seed=0):
    arrays = focal_arrays(np.random.default_rng(seed), n)
    return arrays["inputs"], arrays["targets"]


def with_client(target, use, **settings):
    """Runs `use(client)` in an event loop of its own."""

    async def run():
        async with AsyncClient(target, **settings) as client:
            return await use(client)

    return asyncio.run(run())


def same(value, expected) -> bool:
    if isinstance(expected, list):
        return all(map(same_bits, value, expected))
    return same_bits(value, expected)


def test_both_clients_have_the_same_methods():
    public = {name for name in vars(Client) if not name.startswith("_")}
    assert public == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in public - {"close"}:
        sync, other = getattr(Client, name), getattr(AsyncClient, name)
        assert sync.__annotations__.keys() == other.__annotations__.keys(), name
        if not name.endswith("_stream"):  # items and results of a stream may be asynchronous
            assert sync.__annotations__ == other.__annotations__, name
        assert (sync.__defaults__, sync.__kwdefaults__) == (other.__defaults__, other.__kwdefaults__), name


def test_the_options_of_an_evaluation_are_those_that_methods_take():
    assert LossOptions.__annotations__ == EvaluationOptions.__annotations__


@pytest.mark.parametrize("method", ["compute_loss", "compute_losses", "compute_loss_stream"])
def test_an_unknown_option_is_refused_at_once(client, method):
    with pytest.raises(TypeError, match="unexpected keyword argument 'gradeints'"):
        getattr(client, method)(FocalLoss(), [(LOGITS, LABELS)], gradeints=True)


@pytest.mark.parametrize("case", [*SIMPLE.values(), *FCOS.values()], ids=[*SIMPLE, *FCOS])
def test_equals_the_synchronous_client(client, target, case):
    arguments = case.arguments()
    expected = client.compute_loss(case.config, *arguments, gradients=True)
    result = with_client(target, lambda c: c.compute_loss(case.config, *arguments, gradients=True))
    assert same_bits(result.loss, expected.loss)
    assert result.components == expected.components
    assert result.raw_sums == expected.raw_sums
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert same(result.gradients[name], gradient)


@pytest.mark.parametrize("sparse", [False, True])
def test_targets_equal_those_of_the_synchronous_client(client, target, sparse):
    truth = [scene(np.random.default_rng(1), (96, 96))]
    settings = {"image_size": (96, 96), "sparse": sparse}
    expected = client.assign_targets(FCOSAssigner(), truth, **settings)
    found = with_client(target, lambda c: c.assign_targets(FCOSAssigner(), truth, **settings))
    assert type(found) is type(expected)
    assert found.positive_counts == expected.positive_counts
    if sparse:
        assert same_bits(found.ltrb, expected.ltrb)
    else:
        assert all(same_bits(f.cls, e.cls) for f, e in zip(found.levels, expected.levels, strict=True))


def test_server_info(client, target):
    info = with_client(target, lambda c: c.server_info())
    assert info.custom_losses == client.server_info().custom_losses


def test_options_reach_the_server(target):
    def use(client):
        logits, labels = focal(4)
        return client.compute_loss(
            FocalLoss(), logits, labels, gradients=["inputs"], gradient_dtype=np.float16, normalizer=9.0
        )

    result = with_client(target, use)
    assert result.gradients["inputs"].dtype == np.float16
    assert float(result.loss) == pytest.approx(result.raw_sums["cls_loss"] / 9)


def test_0d_and_custom(target):
    async def use(client):
        scalar = await client.compute_loss(CenternessLoss(), 0.0, 1.0, gradients=True)
        custom = await client.compute_loss(CustomLoss("Named"), PRED)
        return scalar, custom

    scalar, custom = with_client(target, use)
    assert float(scalar.gradients["pred"]) == -0.5
    assert float(custom.loss) == 6


def test_many_calls_at_once(client, target):
    inputs = [focal(n, seed=n) for n in range(1, 21)]
    expected = [client.compute_loss(FocalLoss(), *pair) for pair in inputs]

    async def use(client):
        return await asyncio.gather(*(client.compute_loss(FocalLoss(), *pair) for pair in inputs))

    for result, want in zip(with_client(target, use), expected, strict=True):
        assert same_bits(result.loss, want.loss)


def test_one_failure_among_many_is_its_own(target):
    async def use(client):
        calls = [client.compute_loss(FocalLoss(), LOGITS, LABELS + shift) for shift in (0, 1, 0, 1)]
        return await asyncio.gather(*calls, return_exceptions=True)

    kinds = [isinstance(outcome, InvalidInputError) for outcome in with_client(target, use)]
    assert kinds == [False, True, False, True]


def test_one_client_in_several_event_loops(target):
    client = AsyncClient(target)

    async def use():
        return float((await client.compute_loss(FocalLoss(), LOGITS, LABELS)).loss)

    assert len({asyncio.run(use()) for _ in range(3)}) == 1


def test_closing_is_not_the_end(target):
    async def use(client):
        for _ in range(2):
            assert (await client.compute_loss(FocalLoss(), LOGITS, LABELS)).loss > 0
            await client.close()
            await client.close()

    with_client(target, use)


def test_channel_of_the_callers_is_not_closed(target):
    async def run():
        async with grpc.aio.insecure_channel(target) as channel:
            for _ in range(2):
                async with AsyncClient(channel=channel) as client:
                    assert (await client.compute_loss(FocalLoss(), LOGITS, LABELS)).loss > 0

    asyncio.run(run())


ERRORS = {
    "invalid": (
        lambda c: c.compute_losses(FocalLoss(), [(LOGITS, LABELS), (LOGITS, LABELS + 1)]),
        InvalidInputError,
        "LABEL_OUT_OF_RANGE",
        "items[1].focal.targets",
    ),
    "here": (
        lambda c: c.compute_loss(FocalLoss(), LOGITS, ["a", "b"]),
        InvalidInputError,
        "INVALID_DTYPE",
        "items[0].focal.targets",
    ),
    "not-found": (
        lambda c: c.compute_loss(CustomLoss("Nowhere"), PRED),
        NotFoundError,
        "UNKNOWN_CUSTOM_LOSS",
        "custom.name",
    ),
    "custom": (
        lambda c: c.compute_loss(CustomLoss("Raises"), PRED),
        ServerError,
        "CUSTOM_LOSS_FAILED",
        "items[0].custom",
    ),
    "too-large": (
        lambda c: c.assign_targets(
            FCOSAssigner(), [{"boxes": [], "labels": []}], image_size=(60_000, 60_000)
        ),
        TooLargeError,
        "MESSAGE_TOO_LARGE",
        "items",
    ),
}


@pytest.mark.parametrize(("use", "kind", "reason", "field"), ERRORS.values(), ids=ERRORS)
def test_errors(target, use, kind, reason, field):
    with pytest.raises(kind) as caught:
        with_client(target, use)
    assert type(caught.value) is kind
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_unavailable():
    with pytest.raises(UnavailableError):
        with_client("127.0.0.1:1", lambda c: c.server_info(), timeout=30)


def test_deadline():
    custom_modules.release.clear()
    try:
        with make_server(load=("tests.service.custom_modules:Held",)) as server:
            with pytest.raises(DeadlineError):
                with_client(
                    server.addresses[0], lambda c: c.compute_loss(CustomLoss("Held"), PRED), timeout=0.3
                )
            custom_modules.release.set()
    finally:
        custom_modules.release.set()


def test_a_cancelled_call_is_cancelled(target):
    custom_modules.release.clear()

    async def use(client):
        task = asyncio.create_task(client.compute_loss(CustomLoss("Held"), PRED))
        await asyncio.to_thread(custom_modules.entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        custom_modules.release.set()
        return await client.compute_loss(FocalLoss(), LOGITS, LABELS)

    custom_modules.entered.clear()
    try:
        with make_server(load=("tests.service.custom_modules:Held",)) as server:
            assert with_client(server.addresses[0], use).loss > 0
    finally:
        custom_modules.release.set()


def test_a_large_batch_is_split(small_target, client):
    items = [focal(n, seed=n) for n in (9_000, 10, 12_000, 15_000)]
    expected = client.compute_losses(FocalLoss(), items, gradients=True)
    results = with_client(small_target, lambda c: c.compute_losses(FocalLoss(), items, gradients=True))
    for result, want in zip(results, expected, strict=True):
        assert same_bits(result.gradients["inputs"], want.gradients["inputs"])
    items[3][1][7] = 5
    with pytest.raises(InvalidInputError) as caught:
        with_client(small_target, lambda c: c.compute_losses(FocalLoss(), items))
    assert caught.value.field == "items[3].focal.targets"
    with pytest.raises(TooLargeError) as caught:
        with_client(small_target, lambda c: c.compute_losses(FocalLoss(), [focal(3), focal(60_000)]))
    assert caught.value.field == "items[1]"
