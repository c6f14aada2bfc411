"""Authorities and certificates for the tests of TLS."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

NAMES = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, on disk."""

    cert: str
    key: str

    def bytes(self) -> tuple[bytes, bytes]:
        """Key and certificate, as gRPC wants them."""
        return Path(self.key).read_bytes(), Path(self.cert).read_bytes()


class Authority:
    """An authority whose certificates are on disk."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._authority = trustme.CA(organization_name=name)
        self._count = 0
        self.path = str(directory / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.path)

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return Path(self.path).read_bytes()

    def issue(self, *names: str, expired: bool = False, into: Pair | None = None) -> Pair:
        """Issues a certificate, for the loopback unless said otherwise; `into` writes over another."""
        long_ago = datetime.now(UTC) - timedelta(days=30)
        lifetime = {"not_before": long_ago, "not_after": long_ago + timedelta(days=1)} if expired else {}
        made = self._authority.issue_cert(*(names or NAMES), **lifetime)
        self._count += 1
        stem = self._directory / f"{self._name}-{self._count}"
        pair = into or Pair(cert=f"{stem}.pem", key=f"{stem}.key")
        made.cert_chain_pems[0].write_to_path(pair.cert)
        made.private_key_pem.write_to_path(pair.key)
        return pair
