"""Spoilt requests by the hundred thousand against a server of its own; not collected by pytest.

    python -m tests.fuzz.fuzz_server --requests 100000 --seed 1

Prints how each method answered, and what the server held before and after. It ends with the first answer
that is neither a result nor a clean refusal; the same seed sends the same requests.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import Counter

from tests.faults.support import victim
from tests.fuzz.attack import Attack

SETTINGS = {"max-message-bytes": 4 << 20, "max-connection-age-seconds": 0}
"""Connections live on: the end of one is UNAVAILABLE to a call that begins at that moment."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    share = -(-options.requests // options.processes)
    outcomes: Counter[tuple[str, str]] = Counter()
    limits = [f"--{name}={value}" for name, value in SETTINGS.items()]
    with tempfile.TemporaryDirectory() as directory, victim(directory, *limits) as server:
        outcomes += attack(server.address, 2000, options.seed)  # its buffers and threads are there then
        before, began = server.held(), time.monotonic()
        jobs = [(server.address, share, options.seed + 1 + i) for i in range(options.processes)]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for found in pool.starmap(attack, jobs):
                outcomes += found
        taken = time.monotonic() - began
        time.sleep(2)
        after = server.held()
        server.assert_serves()
    for (method, outcome), count in sorted(outcomes.items()):
        print(f"{method:20} {outcome:36} {count:9,}")
    print(f"{outcomes.total():,} answers, {taken:,.0f} s")
    print(f"before {before}\nafter  {after}")


def attack(address: str, count: int, seed: int) -> Counter[tuple[str, str]]:
    made = Attack(address, seed)
    made.run(count)
    return made.outcomes


if __name__ == "__main__":
    main()
