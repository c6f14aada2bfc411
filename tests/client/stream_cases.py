"""What the tests of streams share: inputs, good and bad, and an iterable that is watched."""

import threading

import numpy as np

from lossd_client import CustomLoss, FocalLoss

LOSS = FocalLoss()
HELD = CustomLoss("Held")
PRED = {"pred": np.ones(2, np.float32)}


def pairs(count, rows=4):
    """Logits and labels of some items, no two alike."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((rows + n, 5)).astype(np.float32), rng.integers(-1, 5, rows + n))
        for n in range(count)
    ]


def with_bad(items, *places):
    """The items with a label out of range in some."""
    return [
        (logits, np.full_like(labels, 9)) if place in places else (logits, labels)
        for place, (logits, labels) in enumerate(items)
    ]


class Watched:
    """Items, and how many of them were taken."""

    def __init__(self, items):
        self._items = items
        self.taken = 0

    def __iter__(self):
        for item in self._items:
            self.taken += 1
            yield item


def answer_threads():
    """The threads of streams that are still there."""
    return [thread for thread in threading.enumerate() if thread.name == "lossd-answers"]
