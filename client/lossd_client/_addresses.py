"""Where servers are: the forms that a client's target takes, as the one that gRPC takes."""

import ipaddress
import re
from collections.abc import Sequence

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^:/\[\]]+)):(?P<port>\d+)")


def grpc_target(target: str | Sequence[str]) -> str:
    """Returns what gRPC takes for a target: of several addresses, all in one.

    Args:
        target: One of gRPC's targets, which is left as it is, or several addresses and ports:
            `10.0.0.1:50051,10.0.0.2:50051`, or a sequence of such.

    Raises:
        ValueError: There is none, or of several one is no address.
    """
    if isinstance(target, str):
        entries = [entry.strip() for entry in target.split(",")]
        if len(entries) == 1 or not all(map(_ADDRESS.fullmatch, entries)):
            return target
    else:
        entries = list(target)
    if not entries:
        raise ValueError("target has no address, want at least one")
    if len(entries) == 1:
        return entries[0]
    addresses = [_address(index, entry) for index, entry in enumerate(entries)]
    if all(isinstance(ip, ipaddress.IPv4Address) for ip, _ in addresses):
        return "ipv4:" + ",".join(f"{ip}:{port}" for ip, port in addresses)
    # One of gRPC's lists is of one family: IPv6 has a form for every IPv4 address.
    return "ipv6:" + ",".join(f"[{_in_ipv6(ip)}]:{port}" for ip, port in addresses)


def _address(index: int, entry: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    match = _ADDRESS.fullmatch(entry)
    if match is None:
        raise ValueError(f"target[{index}] is {entry!r}, want address:port")
    try:
        return ipaddress.ip_address(match["v6"] or match["host"]), match["port"]
    except ValueError:
        # gRPC looks up one name at a time, and again when servers come and go.
        raise ValueError(
            f"target[{index}] is {entry!r}: of several, each is an IP address and a port; "
            "one name with all of the addresses is a target of its own, dns:///name:port"
        ) from None


def _in_ipv6(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"::ffff:{ip}" if isinstance(ip, ipaddress.IPv4Address) else str(ip)
