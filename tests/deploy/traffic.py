"""Callers of every kind: good ones, wrong ones, patient and impatient ones."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from lossd_client import Client, CustomLoss, FCOSAssigner, FocalLoss, LossdError

LABELS = np.zeros((1, 64, 64), np.int64)
SCENE = [{"boxes": np.array([[8, 8, 40, 40]], np.float32), "labels": np.array([1])}]


def one_of_each(client: Client) -> None:
    """Makes every kind of call once; what must be refused is."""
    logits = np.random.default_rng(0).standard_normal((1, 8, 64, 64)).astype(np.float32)
    client.compute_losses(FocalLoss(), [(logits, LABELS)] * 3, gradients=True)
    client.assign_targets(FCOSAssigner(), SCENE, image_size=(64, 96))
    list(client.compute_loss_stream(FocalLoss(), [(logits, LABELS)] * 3))
    list(client.assign_targets_stream(FCOSAssigner(), [SCENE], image_size=(64, 96)))
    client.server_info()
    client.compute_loss(FocalLoss(), np.full_like(logits, np.nan), LABELS)
    for loss, arguments in (
        (FocalLoss(), (logits, LABELS + 99)),
        (CustomLoss("Noisy"), ({"pred": logits},)),
    ):
        with contextlib.suppress(LossdError):
            client.compute_loss(loss, *arguments)
    with contextlib.suppress(LossdError):
        client.compute_loss(FocalLoss(), logits, LABELS, timeout=1e-4)


@contextmanager
def traffic(*targets: str) -> Iterator[None]:
    """Keeps calling servers, one after the other."""
    ended = threading.Event()

    def call() -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(target)) for target in targets]
            for client in itertools.cycle(clients):
                if ended.wait(0.2):
                    return
                one_of_each(client)

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call)
        try:
            yield
        finally:
            ended.set()
            calling.result(60)
