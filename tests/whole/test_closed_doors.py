"""A server with its doors closed, as an operator starts it and looks at it."""

import pytest

from tests.whole.conftest import run, serving

TOKEN = "trainer-0123456789abcdef"  # noqa: S105  # nobody's


@pytest.fixture
def doors(tmp_path, authority):
    """The options of a server, and those that let a caller in."""
    pair, mine = authority.issue(), authority.issue("trainer.example")
    (tmp_path / "tokens.toml").write_text(f'[trainer]\ntoken = "{TOKEN}"\n')
    (tmp_path / "token").write_text(TOKEN)
    server = {
        "--tls-cert": pair.cert,
        "--tls-key": pair.key,
        "--tls-client-ca": authority.path,
        "--tokens": str(tmp_path / "tokens.toml"),
    }
    caller = {"--ca": authority.path, "--cert": mine.cert, "--key": mine.key}
    return flat(server), caller, {"--token-file": str(tmp_path / "token")}


def flat(options):
    return [text for pair in options.items() for text in pair]


def test_info_and_health_get_in_with_their_options_and_say_why_not(doors):
    server, caller, token = doors
    with serving("--log-format", "json", *server) as (process, address, _):
        done = run("info", address, *flat(caller), *flat(token))
        assert (done.returncode, "autotimm" in done.stdout) == (0, True), done.stderr
        done = run("health", address, *flat(caller))
        assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr
        for arguments, why in [
            (["info", address, *flat(caller)], "UNAUTHENTICATED"),
            (["info", address, *flat(token)], "UNAVAILABLE"),
            (["health", address, "--timeout", "5"], "UNAVAILABLE"),
            (
                ["info", address, "--ca", caller["--ca"], "--cert", caller["--cert"]],
                "key is not set, but cert is",
            ),
            (["info", "192.0.2.1:1", *flat(token)], "plain text"),
        ]:
            done = run(*arguments)
            assert done.returncode != 0
            assert why in done.stderr
            assert len(done.stderr.splitlines()) == 1
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert '"reason": "UNAUTHENTICATED"' in log
    assert TOKEN not in log
    assert "PRIVATE" not in log
