"""Several servers behind one client: how they are named, and that calls go round them."""

import numpy as np
import pytest

from lossd_client import Client, FocalLoss, _lanes
from lossd_client._addresses import grpc_target
from tests.client.proxies import proxy_of
from tests.client.twins import KINDS, open_twin
from tests.service.support import focal_arrays

ARRAYS = focal_arrays(np.random.default_rng(0), 5)

FORMS = {
    "as gRPC has it": lambda a, b: f"ipv4:{a},{b}",
    "list": lambda a, b: [a, b],
    "text": lambda a, b: f"{a}, {b}",
    "IPv6 and IPv4": lambda a, b: (a, f"[::ffff:{b.rpartition(':')[0]}]:{b.rpartition(':')[2]}"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_calls_go_round_all_servers(target, kind, form, monkeypatch):
    monkeypatch.setattr(_lanes, "RAPID_SECONDS", 0.0)
    with (
        proxy_of(target) as one,
        proxy_of(target) as other,
        open_twin(kind, FORMS[form](one.address, other.address)) as twin,
    ):
        losses = {
            float(twin.call("compute_loss", FocalLoss(), ARRAYS["inputs"], ARRAYS["targets"]).loss)
            for _ in range(40)
        }
    assert len(losses) == 1
    assert len(one.calls) + len(other.calls) == 40
    assert min(len(one.calls), len(other.calls)) >= 10  # the first calls may find one of them connected


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_not_there_is_passed_over(target, kind):
    with proxy_of(target) as gone:
        pass
    with proxy_of(target) as here, open_twin(kind, [gone.address, here.address], retries=None) as twin:
        twin.client._wait_for_ready = True  # until there is a connection to the other
        for _ in range(20):
            assert twin.call("server_info").version
            twin.client._wait_for_ready = False
    assert len(here.calls) == 20


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("localhost:50051", "localhost:50051"),
        ("dns:///lossd:50051", "dns:///lossd:50051"),
        ("unix:///run/a,b.sock", "unix:///run/a,b.sock"),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["dns:///lossd:50051"], "dns:///lossd:50051"),
        ("[::1]:1,10.0.0.2:2", "ipv6:[::1]:1,[::ffff:10.0.0.2]:2"),
    ],
)
def test_forms_of_a_target(given, taken):
    assert grpc_target(given) == taken


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "target has no address"),
        (["10.0.0.1:1", "10.0.0.2"], r"target\[1\] is '10.0.0.2', want address:port"),
        (["10.0.0.1:1", "unix:/run/lossd.sock"], r"target\[1\] is 'unix:/run/lossd.sock'"),
        ("gpu-1:50051,gpu-2:50051", r"target\[0\] is 'gpu-1:50051': of several, each is an IP address"),
        ("10.0.0.1:1,[::g]:1", r"target\[1\] is '\[::g\]:1'"),
    ],
)
def test_targets_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        Client(given)
