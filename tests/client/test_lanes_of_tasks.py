"""Lanes where tasks wait: shared by some, cancelled, idle, and in one loop after another."""

import asyncio

import pytest

from lossd_client import AsyncClient, CustomLoss, FocalLoss
from lossd_client import _lanes as lanes
from tests.client.lane_support import ENOUGH, PRED, arguments, in_use, opened
from tests.service import custom_modules
from tests.service.metrics import eventually

pytestmark = pytest.mark.usefixtures("rapid")


async def evaluate(client, seed=0):
    result = await client.compute_loss(FocalLoss(), *arguments(seed), gradients=True)
    return float(result.loss)


async def open_lane(client):
    return [await evaluate(client) for _ in range(ENOUGH)]


async def ended(lane_server):
    while in_use(lane_server):
        await asyncio.sleep(0.02)


def test_one_that_is_idle_ends_and_the_next_is_opened_when_it_pays(lane_server, monkeypatch):
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.1)

    async def run():
        async with AsyncClient(lane_server.addresses[0]) as client:
            for _ in range(2):
                await open_lane(client)
                await asyncio.wait_for(ended(lane_server), 20)

    asyncio.run(run())
    assert opened(lane_server) == 2


def test_one_caller_has_it_and_others_go_by_themselves(lane_server):
    async def run():
        async with AsyncClient(lane_server.addresses[0]) as client:
            await open_lane(client)
            seeds = range(16)
            expected = [await evaluate(client, seed) for seed in seeds]
            found = await asyncio.gather(*(evaluate(client, seed) for seed in [*seeds] * 10))
            assert found == expected * 10

    asyncio.run(run())
    assert opened(lane_server) == 1


def test_the_answer_of_a_task_that_was_cancelled_is_nobody_elses(lane_server):
    async def run():
        async with AsyncClient(lane_server.addresses[0]) as client:
            expected = set(await open_lane(client))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.compute_loss(CustomLoss("Held"), PRED), 0.2)
            custom_modules.release.set()
            assert set(await open_lane(client)) == expected

    asyncio.run(run())


def test_every_loop_has_its_own(lane_server):
    client = AsyncClient(lane_server.addresses[0])
    found = [loss for _ in range(3) for loss in asyncio.run(open_lane(client))]
    assert len(set(found)) == 1
    assert opened(lane_server) == 3
    eventually(lambda: in_use(lane_server) == 0)


def test_a_client_is_closed_in_another_loop_than_it_was_used_in(lane_server):
    client = AsyncClient(lane_server.addresses[0])
    asyncio.run(open_lane(client))
    asyncio.run(client.close())
    eventually(lambda: in_use(lane_server) == 0)
