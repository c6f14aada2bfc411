"""A certificate and a token are rotated while calls are made, in the right order: none is lost."""

import threading
from pathlib import Path

import numpy as np

from lossd_client import TLS, Client, FocalLoss
from tests.service.metrics import eventually, value
from tests.service.support import make_server

LOGITS, TARGETS = np.ones((4, 3), np.float32), np.array([0, 1, 2, -1])
OLD, NEW = "old-0123456789abcdef", "new-0123456789abcdef"


def entry(*tokens):
    return f"[trainer]\ntoken = {list(tokens)}\n"


def test_rotation_under_load_loses_no_call(tmp_path, authority, stranger):
    tokens, token, both = tmp_path / "tokens.toml", tmp_path / "token", tmp_path / "both.pem"
    tokens.write_text(entry(OLD))
    token.write_text(OLD)
    both.write_bytes(authority.pem + stranger.pem)
    pair = authority.issue()
    count, failures, stop = [0], [], threading.Event()

    def calls():
        try:
            while not stop.is_set():
                client.compute_loss(FocalLoss(), LOGITS, TARGETS)
                count[0] += 1
        except Exception as error:  # noqa: BLE001  # whatever it is
            failures.append(error)

    def more_calls(number=20):
        before = count[0]
        eventually(lambda: failures or count[0] >= before + number)

    settings = {"tls_cert": pair.cert, "tls_key": pair.key, "tokens": str(tokens)}
    with (
        make_server(max_connection_age_seconds=1, **settings) as server,
        Client(server.addresses[0], tls=TLS(ca=both), token=token) as client,
    ):
        thread = threading.Thread(target=calls)
        thread.start()
        more_calls()
        for change in (
            lambda: stranger.issue(into=pair),
            lambda: replace(tokens, entry(NEW, OLD)),
            lambda: replace(token, NEW),
            lambda: replace(tokens, entry(NEW)),
        ):
            change()
            more_calls()
        eventually(lambda: failures or value(server, "lossd_reloads_total", file="certificate", outcome="ok"))
        more_calls()
        stop.set()
        thread.join()
        assert failures == []
        assert value(server, "lossd_reloads_total", file="tokens", outcome="ok") == 2


def replace(path: Path, text: str) -> None:
    """Writes a file at once: between emptied and written it could be read as another."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.rename(path)
