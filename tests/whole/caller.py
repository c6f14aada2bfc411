"""A caller in a process of its own: `caller.py ADDRESS KIND TIMEOUT`.

Makes `calls`, or one `stream`, until it is told to end; where it has a timeout, it waits for a connection
until then. Prints one line of JSON for every result: how long
it took, and what it was.
"""

import contextlib
import itertools
import json
import sys
import threading
import time

import numpy as np

from lossd_client import Client, FocalLoss, LossdError

RNG = np.random.default_rng(0)
ITEM = RNG.standard_normal((1, 80, 13, 13)).astype(np.float32), RNG.integers(-1, 80, (1, 13, 13))


def say(outcome, seconds):
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"outcome": outcome, "seconds": seconds}), flush=True)


def main(address, kind, timeout):
    seconds = float(timeout) if timeout != "none" else None
    with Client(address, timeout=seconds, wait_for_ready=seconds is not None) as client:
        expected = client.compute_loss(FocalLoss(), *ITEM, gradients=True).gradients["inputs"].tobytes()
        say("ready", 0)
        is_over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()

        def items():
            yield from itertools.takewhile(lambda _: not is_over.is_set(), itertools.repeat(ITEM))

        def one(_item):
            return client.compute_loss(FocalLoss(), *ITEM, gradients=True)

        results = (
            map(one, items())
            if kind == "calls"
            else client.compute_loss_stream(FocalLoss(), items(), gradients=True)
        )
        while True:
            began = time.monotonic()
            try:
                result = next(results, None)
                if result is None:
                    break
                outcome = "right" if result.gradients["inputs"].tobytes() == expected else "wrong"
            except LossdError as error:
                outcome = type(error).__name__
            say(outcome, time.monotonic() - began)


main(*sys.argv[1:])
