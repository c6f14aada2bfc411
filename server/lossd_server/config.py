"""The settings of a server."""

from dataclasses import dataclass

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason

MEBIBYTE = 1 << 20

BATCHING = {"auto": None, "on": True, "off": False}
"""Whether requests go together; None leaves it to the device."""

_LARGEST_PORT = 65535
_LONGEST_AGE = 2_000_000
"""Seconds; gRPC keeps milliseconds in 31 bits."""
_MOST_THREADS = 4096
"""Each request that waits has a thread."""
_LONGEST_READ = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What an operator can set.

    Attributes:
        listen: Addresses to serve on: `host:port` (port 0 takes a free one) or `unix:/path`.
        metrics_port: Port of the Prometheus endpoint; 0 takes a free one, None serves none.
        metrics_host: Address of the Prometheus endpoint.
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.
        max_message_bytes: Largest request that is read, and largest answer of assigned targets.
        max_in_flight: Requests that are received, wait or are worked on at a time; further ones are
            refused. Nobody gets more of these places over one connection than are left for others.
        max_in_flight_bytes: Most bytes of their bodies, those on streams included; shared likewise.
        max_streams: Streams open at a time, beside them, and as many again whose callers ask one thing at a
            time; shared likewise.
        read_seconds: How long the body of a call may take to come, and its answer to be taken.
        max_shared_bytes: Most shared memory that one connection may pass, and that the slices of one
            request come to; 0 shares none. Shared only where one of `listen` is a Unix socket.
        max_total_shared_bytes: Most shared memory over all connections.
        batching: `on` evaluates requests that wait for the device together, `off` one by one; `auto` is
            `on` for a GPU.
        batch_max_items: Most items that are evaluated in one go, of one request or several.
        batch_max_bytes: Most bytes of their tensors, read and written; a single item may be larger.
        batch_wait_us: Microseconds that a batch waits for company.
        wedged_seconds: How long one evaluation may take before the server reports NOT_SERVING; 0 for as
            long as it likes.
        drain_seconds: How long a stopping server waits for what runs.
        max_connection_age_seconds: How long a connection takes new calls; then its client makes another,
            and so finds servers that came later. Those that run go on. 0 for ever.
        tls_cert: File with the server's certificate and the chain to its authority, PEM: TLS on every
            TCP listener. Read anew when it changes, as the next two are.
        tls_key: File with its private key.
        tls_client_ca: File with the authorities of callers: each must have a certificate of theirs.
        tokens: TOML file of the bearer tokens that callers must have one of, and what each may ask; see
            `rpc.tokens`. Read anew when it changes. None lets everyone in who can connect.
        insecure: Whether listeners without TLS may be open to more than this machine.
        unix_mode: Permissions of Unix sockets: who may write may connect.
        spread: Whether the threads of small calls use all cores, and not one that they share.
        tracing: Whether calls are spans of OpenTelemetry, sent by the standard `OTEL_…` variables.
        load: Custom losses beside those of entry points, as `[name=]package.module:Class`.

    Raises:
        InvalidInputError: A number is out of range.
    """

    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    metrics_port: int | None = 9464
    metrics_host: str = "127.0.0.1"
    device: str = "auto"
    max_message_bytes: int = 256 * MEBIBYTE
    max_in_flight: int = 256
    max_in_flight_bytes: int = 1024 * MEBIBYTE
    max_streams: int = 32
    read_seconds: float = 30.0
    max_shared_bytes: int = 1024 * MEBIBYTE
    max_total_shared_bytes: int = 4096 * MEBIBYTE
    batching: str = "auto"
    batch_max_items: int = 64
    batch_max_bytes: int = 64 * MEBIBYTE
    batch_wait_us: int = 0
    wedged_seconds: float = 60.0
    drain_seconds: float = 30.0
    max_connection_age_seconds: float = 300.0
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tokens: str | None = None
    insecure: bool = False
    unix_mode: int = 0o600
    spread: bool = False
    tracing: bool = False
    load: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        # gRPC keeps message lengths in 32 bits.
        checks.require_number(
            "max_message_bytes", self.max_message_bytes, at_least=MEBIBYTE, at_most=2**31 - 1
        )
        for address in self.listen:
            _check_address(address)
        if self.metrics_port is not None:
            checks.require_number("metrics_port", self.metrics_port, at_least=0, at_most=_LARGEST_PORT)
        checks.require_number("max_in_flight", self.max_in_flight, at_least=1, at_most=_MOST_THREADS)
        checks.require_number(
            "max_in_flight_bytes", self.max_in_flight_bytes, at_least=self.max_message_bytes
        )
        checks.require_number("max_streams", self.max_streams, at_least=1, at_most=_MOST_THREADS)
        checks.require_number("read_seconds", self.read_seconds, at_least=0.01, at_most=_LONGEST_READ)
        checks.require_number("max_shared_bytes", self.max_shared_bytes, at_least=0)
        checks.require_number(
            "max_total_shared_bytes", self.max_total_shared_bytes, at_least=self.max_shared_bytes
        )
        if self.batching not in BATCHING:
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"is {self.batching!r}, want one of {', '.join(BATCHING)}",
                field="batching",
                value=self.batching,
            )
        checks.require_number("batch_max_items", self.batch_max_items, at_least=1)
        checks.require_number("batch_max_bytes", self.batch_max_bytes, at_least=1)
        checks.require_number("batch_wait_us", self.batch_wait_us, at_least=0, at_most=1_000_000)
        checks.require_number("wedged_seconds", self.wedged_seconds, at_least=0)
        checks.require_number("drain_seconds", self.drain_seconds, at_least=0)
        checks.require_number(
            "max_connection_age_seconds", self.max_connection_age_seconds, at_least=0, at_most=_LONGEST_AGE
        )
        _check_mode(self.unix_mode)
        _require_with("tls_cert", self.tls_cert, "tls_key", self.tls_key)
        _require_with("tls_key", self.tls_key, "tls_cert", self.tls_cert)
        _require_with("tls_client_ca", self.tls_client_ca, "tls_cert", self.tls_cert)

    @property
    def shared_memory_path(self) -> str | None:
        """Path of the socket that takes shared memory: beside the first Unix socket, or None."""
        paths = [unix_path(address) for address in self.listen if address.startswith("unix:")]
        return f"{paths[0]}.shm" if paths and self.max_shared_bytes else None


def unix_path(address: str) -> str:
    """Returns the path of a `unix:` address."""
    return address.removeprefix("unix:").removeprefix("//")


def split_address(address: str) -> tuple[str, int]:
    """Returns host, without the brackets of IPv6, and port of a TCP address."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_address(address: str) -> None:
    """Raises `InvalidInputError` unless it is `unix:` and a path, or a host and a port."""
    if address.startswith("unix:") and unix_path(address):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _LARGEST_PORT:
        raise InvalidInputError(
            Reason.INVALID_OPTION,
            f"is {address!r}, want host:port with a port in 0..{_LARGEST_PORT}, or unix:/path",
            field="listen",
            value=address,
        )


def _check_mode(mode: int) -> None:
    """Raises `InvalidInputError` unless it is permissions, and no more."""
    if not 0 <= mode <= 0o777:
        raise InvalidInputError(
            Reason.INVALID_OPTION, f"is {mode:#o}, want 0..0o777", field="unix_mode", value=f"{mode:#o}"
        )


def _require_with(field: str, value: str | None, other: str, other_value: str | None) -> None:
    """Raises `InvalidInputError` where a setting is made without another that it takes."""
    if value is not None and other_value is None:
        raise InvalidInputError(Reason.INVALID_OPTION, f"is not set, but {field} is", field=other, value="")
