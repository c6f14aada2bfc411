"""What lets a client in: targets that stay on this host, pairs of files, tokens that are never shown."""

import pytest

from lossd_client._access import TLS, Access, stays_on_this_host

TOKEN = "swordfish-0123456789"  # noqa: S105  # nobody's


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "localhost",
        "127.0.0.1:50051",
        "127.9.9.9:1",
        "[::1]:50051",
        "[::ffff:127.0.0.1]:50051",
        "dns:///localhost:50051",
        "dns:localhost:50051",
        "ipv4:127.0.0.1:1,127.0.0.1:2",
        "ipv6:[::1]:1,[::1]:2",
        "unix:/run/lossd.sock",
        "unix:///run/lossd.sock",
    ],
)
def test_targets_of_this_host_may_have_a_token_as_plain_text(target):
    assert stays_on_this_host(target)
    assert Access(target, token=TOKEN).metadata() == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:50051",
        "0.0.0.0:50051",
        "lossd.example:50051",
        "localhost.example:50051",
        "127.0.0.1.example:50051",
        "dns:///lossd:50051",
        "dns://10.0.0.53/localhost:50051",
        "ipv4:127.0.0.1:1,10.0.0.1:2",
        "ipv6:[::1]:1,[::ffff:10.0.0.1]:2",
        "xds:///lossd",
        "[::]:50051",
        "",
    ],
)
def test_any_other_target_needs_tls_or_leave_for_a_token(target):
    assert not stays_on_this_host(target)
    with pytest.raises(ValueError, match="a token would go there as plain text") as caught:
        Access(target, token=TOKEN)
    assert TOKEN not in str(caught.value)
    assert Access(target, token=TOKEN, tls=TLS(server_name="lossd")).metadata()
    assert Access(target, token=TOKEN, insecure=True).metadata()
    assert Access(target).metadata() is None


def test_a_token_in_a_file_is_read_for_every_call(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    access = Access("localhost:1", token=file)
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}"),)
    assert access.settings_to_pickle()["token"] == file
    file.write_text("another-0123456789")
    assert access.metadata() == (("authorization", "Bearer another-0123456789"),)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="token"):
        access.metadata()


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
def test_what_no_header_carries_is_no_token(tmp_path, token):
    with pytest.raises(ValueError, match="visible ASCII"):
        Access("localhost:1", token=token)
    file = tmp_path / "token"
    file.write_text(token)
    with pytest.raises(ValueError, match="visible ASCII"):
        Access("localhost:1", token=file).metadata()


def test_a_token_is_never_shown():
    access = Access("localhost:1", token=TOKEN)
    assert TOKEN not in f"{access!r} {access}"
    with pytest.raises(TypeError, match="is not pickled") as caught:
        access.settings_to_pickle()
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(("half", "missing"), [("cert", "key"), ("key", "cert")])
def test_certificate_and_key_go_together(half, missing):
    with pytest.raises(ValueError, match=f"{missing} is not set, but {half} is"):
        TLS(**{half: "a.pem"})


@pytest.mark.parametrize("missing", ["ca", "cert", "key"])
def test_a_file_that_is_not_there_is_said_by_its_name(tmp_path, missing):
    paths = {name: tmp_path / name for name in ("ca", "cert", "key")}
    for name, path in paths.items():
        if name != missing:
            path.write_text("")
    with pytest.raises(FileNotFoundError, match=missing):
        Access("localhost:1", tls=TLS(**paths)).open()
