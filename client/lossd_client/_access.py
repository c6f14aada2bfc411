"""How a client gets in: TLS, and the token that says who calls."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lossd.channel_options import Options, client_options
from lossd_client._tracing import with_trace

Metadata = tuple[tuple[str, str], ...]

_SCHEME = re.compile(r"(?:dns|ipv4|ipv6):/*")
_HOST_AND_PORT = re.compile(r"\[(?P<v6>[^\[\]]+)\](?::\d+)?|(?P<host>[^:]+)(?::\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class TLS:
    """An encrypted connection; files are read when it is made, and again for the next.

    Attributes:
        ca: PEM file of the authorities that the server's certificate may be from; None for those that
            gRPC trusts by itself.
        cert: PEM file of a certificate of the caller's own, for a server that asks for one.
        key: PEM file of its key.
        server_name: Name that the server's certificate must be for, in place of the target's; several
            addresses have none of their own.

    Raises:
        ValueError: One of `cert` and `key` is there without the other.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuses half of a pair."""
        if (self.cert is None) != (self.key is None):
            there, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise ValueError(f"{missing} is not set, but {there} is")

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns what a channel takes; raises `OSError` where a file cannot be read."""
        ca, key, cert = (
            None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)

    def options(self) -> Options:
        """Returns the options that a channel needs beside them."""
        name = self.server_name
        return [] if name is None else [("grpc.ssl_target_name_override", name)]


class Access:
    """What of a client's settings lets it in. It never shows its token.

    Args:
        target: Where the server listens.
        tls: Encryption; None for plain text.
        token: The bearer token, or the path of a file that holds it and is read for every call; None
            for a server that asks for none.
        insecure: Whether a token may go over a network as plain text.

    Raises:
        ValueError: It may not, but would; or the token is none; or there are several addresses and no name
            for their certificates.
    """

    def __init__(
        self, target: str, *, tls: TLS | None = None, token: str | Path | None = None, insecure: bool = False
    ) -> None:
        if token is not None and tls is None and not insecure and not stays_on_this_host(target):
            raise ValueError(
                f"target is {target!r}: a token would go there as plain text; "
                "set tls, or allow it with insecure"
            )
        if tls is not None and tls.server_name is None and "," in target:
            # gRPC would look for a certificate for all of the addresses in one.
            raise ValueError(
                f"server_name of tls is not set: certificates are for one name, not for {target!r}"
            )
        if isinstance(token, str):
            _require_token(token)
        self._target = target
        self._tls = tls
        self._token = token
        self._insecure = insecure

    def settings(self) -> dict[str, Any]:
        """Returns what another client takes to get in alike."""
        return {"tls": self._tls, "token": self._token, "insecure": self._insecure}

    def settings_to_pickle(self) -> dict[str, Any]:
        """Returns the same for another process, or for a file such as a checkpoint of torch.

        Raises:
            TypeError: The token would be written there.
        """
        if isinstance(self._token, str):
            raise TypeError(
                "a client that holds a token is not pickled, or the token would be in the pickle: "
                "give it the path of a file with the token"
            )
        return self.settings()

    def metadata(self) -> Metadata | None:
        """Returns what goes with every call.

        Raises:
            OSError: The file of the token cannot be read.
            ValueError: It holds none.
        """
        if self._token is None:
            return with_trace(None)
        token = self._token
        if isinstance(token, Path):
            token = token.read_text().strip()
            _require_token(token)
        return with_trace((("authorization", f"Bearer {token}"),))

    def open(self) -> grpc.Channel:
        """Returns a channel for ordinary code; raises `OSError` where a file of TLS cannot be read."""
        if self._tls is None:
            return grpc.insecure_channel(self._target, options=client_options())
        return grpc.secure_channel(
            self._target, self._tls.credentials(), client_options() + self._tls.options()
        )

    def open_async(self) -> grpc.aio.Channel:
        """Returns the same for asyncio."""
        if self._tls is None:
            return grpc.aio.insecure_channel(self._target, options=client_options())
        return grpc.aio.secure_channel(
            self._target, self._tls.credentials(), client_options() + self._tls.options()
        )


def stays_on_this_host(target: str) -> bool:
    """Returns whether all that is sent to a target stays on this host; of a name only `localhost` does."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    return all(_is_loopback(address) for address in _SCHEME.sub("", target, count=1).split(","))


def _is_loopback(address: str) -> bool:
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None:
        return False
    host = match["v6"] or match["host"]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _require_token(token: str) -> None:
    """Raises `ValueError`, without the token, unless a header can carry it."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token is not visible ASCII characters alone")
