"""TLS of the listeners: certificate, key and the authority of callers, read anew when they are rotated."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import structlog

from lossd_server.config import ServerConfig
from lossd_server.errors import ConfigurationError
from lossd_server.rpc.files import WatchedFiles, read_file, unusable
from lossd_server.rpc.metrics import Metrics, ReloadedFile

_log = structlog.get_logger()


class Certificates:
    """What the server proves itself with, and what callers must prove themselves with, if they must.

    Args:
        config: Names the files: `tls_cert` and `tls_key`, and `tls_client_ca` for mutual TLS.
        metrics: What counts reloads.

    Raises:
        ConfigurationError: A file cannot be read, or is not what it should be.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        paths = (config.tls_cert, config.tls_key, config.tls_client_ca)
        self._files = WatchedFiles([path for path in paths if path])
        self._files.have_changed()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Returns what a listener takes; every new connection has the files looked at."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._changed,  # type: ignore[arg-type]  # the stub does not know that None means no change
            require_client_authentication=self._config.tls_client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns what changed files hold, or None for what is in use: also where they are no use."""
        if not self._files.have_changed():
            return None
        try:
            found = self._read()
        except ConfigurationError as error:
            self._metrics.count_reload(ReloadedFile.CERTIFICATE, failed=True)
            _log.error(
                "certificate not reloaded, the old one stays", field=error.field, message=error.message
            )
            return None
        self._metrics.count_reload(ReloadedFile.CERTIFICATE, failed=False)
        _log.info("certificate reloaded", path=self._config.tls_cert)
        return found

    def _read(self) -> grpc.ServerCertificateConfiguration:
        config = self._config
        certificate = read_file("tls_cert", config.tls_cert or "")
        key = read_file("tls_key", config.tls_key or "")
        _require_pair(config, certificate, key)
        authority = None
        if config.tls_client_ca is not None:
            authority = read_file("tls_client_ca", config.tls_client_ca)
            _require_authority(config.tls_client_ca, authority)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


def _require_pair(config: ServerConfig, certificate: bytes, key: bytes) -> None:
    """Raises `ConfigurationError` unless a key is that of a certificate, which gRPC tells nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # From memory: the files may be rotated between two looks at them.
        with _path_of(certificate) as certificate_path, _path_of(key) as key_path:
            context.load_cert_chain(certificate_path, key_path, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise unusable(
            "tls_cert",
            config.tls_cert or "",
            f"{config.tls_cert} and {config.tls_key} are no certificate and its key: {_reason(error)}",
        ) from error


def _require_authority(path: str, authority: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=authority.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise unusable(
            "tls_client_ca", path, f"{path} holds no certificate of an authority: {_reason(error)}"
        ) from error


def _no_password() -> str:
    """Keeps OpenSSL from asking the terminal for the password of an encrypted key."""
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    """Returns what OpenSSL says is wrong, without the place in its source."""
    return (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")


@contextmanager
def _path_of(data: bytes) -> Iterator[str]:
    """Yields a path, in memory, of a file with some bytes in it."""
    with os.fdopen(os.memfd_create("lossd-tls"), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"
