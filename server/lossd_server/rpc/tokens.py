"""The bearer tokens of callers, by a file that is read anew when it changes.

```toml
[trainer]                    # a name for people: logs and errors bear it, and never the token
token = "…"                  # 16 characters or more; ["new", "old"] while callers change from one to another
requests_per_second = 200    # as this and the next, where there is a limit
bytes_per_second = 1e9
```
"""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from lossd_server import checks
from lossd_server.errors import ConfigurationError, InvalidInputError
from lossd_server.rpc.files import WatchedFiles, read_file, unusable
from lossd_server.rpc.metrics import Metrics, ReloadedFile
from lossd_server.rpc.rates import Allowance

SHORTEST_TOKEN = 16
"""Characters; shorter ones could be guessed."""

_FIELD = "tokens"
_LIMITS = ("requests_per_second", "bytes_per_second")

_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Account:
    """Whom a token stands for.

    Attributes:
        name: Who it is, for people.
        limits: What it may ask a second, as the file says.
        allowance: What of that is left.
    """

    name: str
    limits: Mapping[str, float]
    allowance: Allowance


class Tokens:
    """The tokens of a file. Of each only the SHA-256 is kept.

    Args:
        path: Where the file is.
        metrics: What counts reloads.

    Raises:
        ConfigurationError: It cannot be read, or is not what it should be.
    """

    def __init__(self, path: str, metrics: Metrics) -> None:
        self._path = path
        self._metrics = metrics
        self._file = WatchedFiles([path])
        self._file.have_changed()
        self._accounts = self._read({})

    def account(self, token: str) -> Account | None:
        """Returns whom a token stands for, or None where nobody knows it.

        It is looked up by its hash: how long that takes tells nothing about any token in the file.
        """
        if self._file.have_changed():
            self._reload()
        return self._accounts.get(_digest(token))

    def _reload(self) -> None:
        """Takes in a changed file; where it is no use, what was known stays known."""
        try:
            known = {account.name: account for account in self._accounts.values()}
            self._accounts = self._read(known)
        except ConfigurationError as error:
            self._metrics.count_reload(ReloadedFile.TOKENS, failed=True)
            _log.error("tokens not reloaded, the old ones stay", field=error.field, message=error.message)
        else:
            self._metrics.count_reload(ReloadedFile.TOKENS, failed=False)
            _log.info("tokens reloaded", path=self._path)

    def _read(self, known: Mapping[str, Account]) -> dict[bytes, Account]:
        """Returns the accounts by the hashes of their tokens; who had a limit and has it still goes on."""
        try:
            entries = tomllib.loads(read_file(_FIELD, self._path).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise unusable(_FIELD, self._path, f"{self._path} is no TOML: {_place(error)}") from None
        accounts: dict[bytes, Account] = {}
        for name, entry in entries.items():
            try:
                digests, account = _entry(name, entry, known.get(name))
                _require_new(digests, accounts)
            except InvalidEntryError as error:
                raise unusable(_FIELD, self._path, f"{self._path}: {name} {error}") from None
            accounts.update(dict.fromkeys(digests, account))
        if not accounts:
            raise unusable(_FIELD, self._path, f"{self._path} holds no token")
        return accounts


class InvalidEntryError(ValueError):
    """What is wrong with an entry of the file; never the token itself."""


def _entry(name: str, entry: Any, before: Account | None) -> tuple[list[bytes], Account]:
    """Returns the hashes of an entry's tokens and its account: as before, where its limits are."""
    tokens, limits = _tokens_of(entry), _limits_of(entry)
    if before is None or before.limits != limits:
        requests, size = (limits.get(limit) for limit in _LIMITS)
        allowance = Allowance(name, requests_per_second=requests, bytes_per_second=size)
        before = Account(name=name, limits=limits, allowance=allowance)
    return [_digest(token) for token in tokens], before


def _require_new(digests: Sequence[bytes], accounts: Mapping[bytes, Account]) -> None:
    for digest in digests:
        if digest in accounts:
            raise InvalidEntryError(f"has a token of {accounts[digest].name}")


def _tokens_of(entry: Any) -> list[str]:
    """Returns the tokens of an entry: one, or a list of some."""
    value = entry.get("token") if isinstance(entry, dict) else None
    tokens: list[Any] = value if isinstance(value, list) else [value]
    if not tokens:
        raise InvalidEntryError("has no token")
    for token in tokens:
        _require_token(token)
    return tokens


def _require_token(token: object) -> None:
    if not isinstance(token, str):
        raise InvalidEntryError("has no token")
    if len(token) < SHORTEST_TOKEN:
        raise InvalidEntryError(f"has a token of {len(token)} characters, want at least {SHORTEST_TOKEN}")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InvalidEntryError("has a token with other characters than visible ASCII")


def _limits_of(entry: Mapping[str, Any]) -> dict[str, float]:
    if unknown := sorted(entry.keys() - {"token", *_LIMITS}):
        raise InvalidEntryError(f"has unknown settings: {', '.join(unknown)}")
    limits = {name: entry[name] for name in _LIMITS if name in entry}
    for name, limit in limits.items():
        try:
            checks.require_number(name, limit, above=0)
        except InvalidInputError as error:
            raise InvalidEntryError(f"has a limit that cannot be: {error}") from None
    return limits


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _place(error: Exception) -> str:
    """Returns what is wrong with a file without a word of what is in it."""
    return str(error) if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8"
