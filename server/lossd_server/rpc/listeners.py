"""Where the server listens: TCP, with TLS or on the loopback, and Unix sockets."""

import ipaddress
import socket
from pathlib import Path

import grpc

from lossd_server.config import ServerConfig, split_address, unix_path
from lossd_server.errors import ConfigurationError, Reason
from lossd_server.unix_sockets import permissions


def listen(
    server: grpc.Server, config: ServerConfig, credentials: grpc.ServerCredentials | None
) -> list[str]:
    """Listens on every address and returns them with the ports that were taken.

    Args:
        server: What serves there.
        config: Names the addresses.
        credentials: TLS for those of TCP; None for plain text. Unix sockets are plain text always: nobody
            is in between.

    Raises:
        ConfigurationError: An address cannot be listened on, or not as plain text.
    """
    return [
        _listen_unix(server, address, config.unix_mode)
        if address.startswith("unix:")
        else _listen_tcp(server, address, credentials, insecure=config.insecure)
        for address in config.listen
    ]


def _listen_tcp(
    server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None, *, insecure: bool
) -> str:
    host, port = split_address(address)
    if credentials is None and not insecure:
        _require_loopback(address, host)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _refusal(address, _why_not_tcp(host, port)) from error
    return f"{address.rpartition(':')[0]}:{port}"


def _listen_unix(server: grpc.Server, address: str, mode: int) -> str:
    path = unix_path(address)
    _refuse_served_socket(address, path)
    try:
        with permissions(mode):
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise _refusal(address, _why_not_unix(path)) from error
    return address


def _require_loopback(address: str, host: str) -> None:
    """Raises `ConfigurationError` where others than this machine would be listened to."""
    if not all(ip.is_loopback for ip in _addresses_of(address, host)):
        raise ConfigurationError(
            Reason.INVALID_OPTION,
            f"{address} is plain text to more than this machine: "
            "set --tls-cert and --tls-key, or allow it with --insecure",
            field="listen",
            address=address,
        )


def _addresses_of(address: str, host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _refusal(address, error.strerror or str(error)) from error
    return [ipaddress.ip_address(str(where[0]).partition("%")[0]) for *_, where in found]


def _refuse_served_socket(address: str, path: str) -> None:
    """Raises `ConfigurationError` where someone listens; gRPC would take the path from under them."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return
    raise _refusal(address, "a server does")


def _why_not_tcp(host: str, port: int) -> str:
    """Returns why a port cannot be bound, which gRPC does not say."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC does not take it"


def _why_not_unix(path: str) -> str:
    """Returns why a path cannot be bound, as above."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        Path(path).unlink()
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC does not take it"


def _refusal(address: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        Reason.INVALID_OPTION, f"cannot listen on {address}: {why}", field="listen", address=address
    )
