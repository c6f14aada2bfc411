"""Two replicas under load, one of which is killed every few seconds: no call is lost, no result wrong.

`LOSSD_LONG=1` makes it a minute.
"""

import asyncio
import itertools
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest

from lossd_client import AsyncClient, Client, FCOSAssigner, FocalLoss
from tests.service.support import scene
from tests.whole.replicas import Replica

SECONDS = 60 if os.environ.get("LOSSD_LONG") else 15
EVERY = 5.0
"""Seconds from one replica's end to the other's, if the first is back by then."""
LEAST = 0.5
"""Seconds that both are there in any case."""

ASSIGNER = FCOSAssigner()
STREAM_ITEMS = 12

pytestmark = pytest.mark.timeout(SECONDS + 240)


def logits(shape, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32), rng.integers(-1, shape[1], (shape[0], *shape[2:]))


SMALL = [logits((1, 80, 13, 13), seed) for seed in range(4)]
MIDDLE = logits((2, 80, 100, 100), 9)
LARGE = logits((3, 80, 100, 100), 8)
"""Goes in chunks."""
IMAGES = [[scene(np.random.default_rng(seed), (480, 640), 20)] for seed in range(4)]


def loss_bits(result):
    return result.loss.tobytes(), result.gradients["inputs"].tobytes()


def target_bits(targets):
    return targets.ltrb.tobytes(), targets.labels.tobytes(), tuple(targets.positive_counts)


CALLS = {
    "assign": [
        lambda client, images=images: client.assign_targets(
            ASSIGNER, images, image_size=(480, 640), sparse=True
        )
        for images in IMAGES
    ],
    "small": [
        lambda client, item=item: client.compute_loss(FocalLoss(), *item, gradients=True) for item in SMALL
    ],
    "middle": [lambda client: client.compute_loss(FocalLoss(), *MIDDLE, gradients=True)],
    "large": [lambda client: client.compute_loss(FocalLoss(), *LARGE, gradients=True)],
}
BITS = {"assign": target_bits, "small": loss_bits, "middle": loss_bits, "large": loss_bits}
MIX = ["assign"] * 6 + ["small"] * 6 + ["middle", "large"]


class Tally:
    """What became of the calls."""

    def __init__(self, expected):
        self.expected = expected
        self.right = Counter()
        self.wrong = Counter()
        self.lost = []
        self.is_over = threading.Event()

    def check(self, kind, place, result, of=None):
        is_right = BITS[of or kind](result) == self.expected[of or kind][place]
        (self.right if is_right else self.wrong)[kind] += 1

    @contextmanager
    def counting_losses(self, kind):
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever it is, a call was lost
            self.lost.append(f"{kind}: {error!r}")


def call_in_turn(client, tally, seed):
    rng = np.random.default_rng(seed)
    while not tally.is_over.is_set():
        kind = str(rng.choice(MIX))
        place = int(rng.integers(len(CALLS[kind])))
        with tally.counting_losses(kind):
            tally.check(kind, place, CALLS[kind][place](client))


def stream(client, tally):
    while not tally.is_over.is_set():
        items = list(itertools.islice(itertools.cycle(SMALL), STREAM_ITEMS))
        with tally.counting_losses("stream"):
            results = client.compute_loss_stream(FocalLoss(), items, gradients=True)
            for place, (_, result) in enumerate(zip(items, results, strict=True)):
                tally.check("stream", place % len(SMALL), result, of="small")


async def call_by_asyncio(client, tally, kind):
    for place in itertools.cycle(range(len(CALLS[kind]))):
        if tally.is_over.is_set():
            return
        with tally.counting_losses(f"async {kind}"):
            tally.check(f"async {kind}", place, await CALLS[kind][place](client), of=kind)


async def stream_by_asyncio(client, tally):
    while not tally.is_over.is_set():
        with tally.counting_losses("async stream"):
            stream = client.assign_targets_stream(ASSIGNER, IMAGES * 3, image_size=(480, 640), sparse=True)
            results = [targets async for targets in stream]
            for place, (_, targets) in enumerate(zip(IMAGES * 3, results, strict=True)):
                tally.check("async stream", place % len(IMAGES), targets, of="assign")


def run_asyncio(addresses, tally):
    async def run():
        async with AsyncClient(addresses) as client:
            await asyncio.gather(
                call_by_asyncio(client, tally, "assign"),
                call_by_asyncio(client, tally, "small"),
                call_by_asyncio(client, tally, "large"),
                stream_by_asyncio(client, tally),
            )

    asyncio.run(run())


def kill_in_turn(replicas):
    """Ends one replica after the other, by either signal in turn, and starts it again; counts the ends."""
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
    began, ends = time.monotonic(), Counter()
    due = began + EVERY
    for replica, number in zip(itertools.cycle(replicas), itertools.cycle(signals), strict=False):
        time.sleep(max(due - time.monotonic(), LEAST))
        if time.monotonic() > began + SECONDS:
            return ends
        due = time.monotonic() + EVERY
        replica.end(number)
        ends[number.name] += 1
        replica.start()
        replica.wait_until_serving()
    raise AssertionError


def expected_bits(replicas):
    """The right answers: of each replica the same, to the bit."""
    answers = []
    for replica in replicas:
        with Client(replica.address) as client:
            answers.append(
                {kind: [BITS[kind](call(client)) for call in calls] for kind, calls in CALLS.items()}
            )
    assert answers[0] == answers[1]
    return answers[0]


def test_replicas_that_are_killed_in_turn_lose_no_call(tmp_path):
    replicas = [Replica(tmp_path, name) for name in "ab"]
    try:
        for replica in replicas:
            replica.wait_until_serving()
        addresses = [replica.address for replica in replicas]
        tally = Tally(expected_bits(replicas))
        with Client(addresses) as client, Client(addresses, hedge_after=0.5) as hedging:
            threads = [
                threading.Thread(target=call_in_turn, args=(client, tally, 1)),
                threading.Thread(target=call_in_turn, args=(client, tally, 2)),
                threading.Thread(target=call_in_turn, args=(hedging, tally, 3)),
                threading.Thread(target=stream, args=(client, tally)),
                threading.Thread(target=run_asyncio, args=(addresses, tally)),
            ]
            for thread in threads:
                thread.start()
            try:
                ends = kill_in_turn(replicas)
            finally:
                tally.is_over.set()
                for thread in threads:
                    thread.join(90)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        for replica in replicas:
            replica.end(signal.SIGTERM)
    print(f"{SECONDS:g} s, ends {dict(ends)}, right {dict(tally.right)}, wrong {dict(tally.wrong)}")
    assert tally.lost == []
    assert not tally.wrong
    assert min(ends.values()) >= 1
    assert tally.right.keys() == {
        "assign",
        "small",
        "middle",
        "large",
        "stream",
        "async assign",
        "async small",
        "async large",
        "async stream",
    }
    # By SIGTERM they end with 0, having answered what they took.
    assert {code for replica in replicas for code in replica.exits} <= {0, -signal.SIGKILL}
