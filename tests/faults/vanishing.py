"""Clients that are made to be killed: each says that it is ready, and calls until it is gone."""

import sys
import threading

import numpy as np

from lossd_client import Client, FCOSAssigner, FocalLoss

LOGITS = np.zeros((1, 80, 100, 100), np.float32)
SCENE = {"boxes": np.array([[4.0, 4.0, 600.0, 600.0]], np.float32), "labels": np.array([1])}
LABELS = np.zeros((1, 100, 100), np.int32)


def in_a_request(address):
    """Large requests inline, most of the time on their way."""
    with Client(address) as client:
        ready()
        while True:
            client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)


def on_a_stream(address):
    """Results come, and are used slowly: requests, work and answers of the stream are all there."""
    with Client(address) as client:
        items = iter(lambda: (LOGITS, LABELS), None)
        for number, _ in enumerate(client.compute_loss_stream(FocalLoss(), items, gradients=True)):
            if number == 2:
                ready()


def with_shared_memory(address):
    """Logits and gradients in memory that the server has mapped."""
    with Client(address) as client:
        logits = client.allocate(LOGITS.shape)
        ready()
        while True:
            client.compute_loss(FocalLoss(), logits, LABELS, gradients=True)


def with_many_calls(address):
    """Small calls of several threads at a time on one connection."""
    with Client(address) as client:

        def call():
            while True:
                client.assign_targets(FCOSAssigner(), [SCENE], image_size=(800, 1333), sparse=True)

        for _ in range(8):
            threading.Thread(target=call, daemon=True).start()
        ready()
        threading.Event().wait()


def ready():
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
