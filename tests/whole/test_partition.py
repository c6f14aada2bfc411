"""What a bad network does to callers and to a server: packets that are lost, and a wire that is cut.

`LOSSD_LONG=1` cuts it for longer, and for as long as it takes for both sides to notice.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.domain.regions import wait_until
from tests.whole.conftest import LOSSD
from tests.whole.hosts import Hosts

IS_LONG = bool(os.environ.get("LOSSD_LONG"))
SECONDS = 30 if IS_LONG else 6
NOTICED_SECONDS = 100
"""In which both sides have noticed that the other is gone: by pings, after 60 and 80 seconds."""

CALLER = [sys.executable, str(Path(__file__).parent / "caller.py")]
SHORT = 2.0
MOST_STREAMS = 6

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def hosts():
    made = Hosts()
    made.connect()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def server(hosts, tmp_path_factory):
    """The process and the address of a server on one host."""
    address = f"{hosts.server}:50051"
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--listen", address, "--insecure", "--metrics-port", "-1", "--device", "cpu"]
    options += ["--max-streams", str(MOST_STREAMS)]
    with log.open("w") as sink:
        process = hosts.start_server(*LOSSD, "serve", *options, stderr=sink)
    wait_until(lambda: "serving" in log.read_text(), seconds=120)
    yield process, address
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.fixture(autouse=True)
def _healed(hosts):
    yield
    hosts.heal()


class Caller:
    """Calls from the other host, until told to end."""

    def __init__(self, hosts, address, kind, timeout, directory, name):
        self._said = directory / name
        with self._said.open("w") as sink:
            self.process = hosts.start_caller(*CALLER, address, kind, str(timeout), stdin=-1, stdout=sink)
        wait_until(self.results, seconds=60)

    def results(self):
        lines = self._said.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def end(self, within):
        """What it got, and the seconds of its slowest call."""
        assert self.process.wait(within) == 0
        results = self.results()[1:]
        return Counter(result["outcome"] for result in results), max(r["seconds"] for r in results)


@contextmanager
def calling(hosts, address, directory, **timeouts):
    """Callers by name: `calls` or `stream` and a timeout."""
    callers = {
        name: Caller(hosts, address, kind, timeout, directory, name)
        for name, (kind, timeout) in timeouts.items()
    }
    try:
        yield callers
    finally:
        for caller in callers.values():
            caller.process.kill()
            caller.process.wait()
            caller.process.stdin.close()


def end_all(callers):
    """What each caller got, and its slowest call."""
    for caller in callers.values():
        caller.process.stdin.close()
    return {name: caller.end(60) for name, caller in callers.items()}


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_where_packets_are_lost_all_calls_are_answered(hosts, server, tmp_path, share):
    _, address = server
    with calling(hosts, address, tmp_path, calls=("calls", 60), stream=("stream", 60)) as callers:
        hosts.lose(share)
        time.sleep(SECONDS)
        found = end_all(callers)
    print(f"{share:.0%} of packets lost for {SECONDS} s: {found}")
    assert all(outcomes.keys() == {"right"} for outcomes, _ in found.values())


def test_a_cut_that_heals_loses_no_call_and_no_deadline_is_missed(hosts, server, tmp_path):
    _, address = server
    kinds = {"calls": ("calls", 120), "stream": ("stream", 120), "short": ("calls", SHORT)}
    with calling(hosts, address, tmp_path, **kinds) as callers:
        hosts.part()
        time.sleep(SECONDS)
        before = {name: len(caller.results()) for name, caller in callers.items()}
        hosts.heal()
        for name, caller in callers.items():
            wait_until(lambda c=caller, n=name: len(c.results()) > before[n] + 5, seconds=60)
        found = end_all(callers)
    print(f"cut for {SECONDS} s: {found}")
    assert found["calls"][0].keys() == {"right"}
    assert found["stream"][0].keys() == {"right"}
    outcomes, slowest = found["short"]
    assert outcomes["DeadlineError"] >= 1
    assert outcomes.keys() <= {"right", "DeadlineError", "UnavailableError"}
    assert slowest < SHORT + 3


@pytest.mark.skipif(not IS_LONG, reason="takes minutes: LOSSD_LONG=1")
def test_who_is_gone_without_a_word_is_noticed_by_both_sides(hosts, server, tmp_path):
    process, address = server
    threads = Path(f"/proc/{process.pid}/task")
    kinds = {f"stream-{n}": ("stream", "none") for n in range(MOST_STREAMS)}
    with calling(hosts, address, tmp_path, **kinds, calls=("calls", "none")) as callers:
        time.sleep(1)
        busy = len(list(threads.iterdir()))
        hosts.part()
        time.sleep(NOTICED_SECONDS)
        outcomes = Counter(result["outcome"] for result in callers["calls"].results()[1:])
        print(f"cut for {NOTICED_SECONDS} s, calls without a deadline: {outcomes}")
    hosts.heal()
    # The server has a place for each of these only where it took those of the others back.
    with calling(hosts, address, tmp_path, **kinds) as callers:
        time.sleep(SECONDS / 10)
        found = end_all(callers)
    print(f"then: {found}; threads of the server {busy}, then {len(list(threads.iterdir()))}")
    assert outcomes["UnavailableError"] >= 1
    assert all(outcomes.keys() == {"right"} for outcomes, _ in found.values())
    assert len(list(threads.iterdir())) <= busy + 2
