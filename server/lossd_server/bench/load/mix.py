"""Who calls: how many callers of each kind."""

import re
from dataclasses import dataclass, replace

from lossd_server.bench.load.kinds import KINDS
from lossd_server.errors import InvalidInputError, Reason

_SHARE = re.compile(r"([a-z0-9-]+)(?::([1-9][0-9]{0,3}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Callers of one kind.

    Attributes:
        kind: Its name in `KINDS`.
        callers: How many, at least 1.
    """

    kind: str
    callers: int


def read_mix(text: str, concurrency: int | None = None) -> tuple[Share, ...]:
    """Reads `kind:callers,kind:callers`; a kind alone is one caller.

    Args:
        text: The mix.
        concurrency: Callers in all; their numbers in the text are shares of it then. A kind has at
            least one, so that they may be more. None takes the numbers as they are.

    Raises:
        InvalidInputError: A kind is unknown or named twice, or a number is none.
    """
    shares = tuple(_read_share(part.strip()) for part in text.split(","))
    names = [share.kind for share in shares]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise _refused(f"names {', '.join(sorted(repeated))} more than once", text)
    return shares if concurrency is None else _scaled(shares, concurrency)


def _read_share(text: str) -> Share:
    match = _SHARE.fullmatch(text)
    if match is None:
        raise _refused(f"has {text!r}, want kind:callers with 1 to 9999 callers", text)
    name, callers = match.groups()
    if name not in KINDS:
        raise _refused(f"has {name!r}, want one of {', '.join(KINDS)}", name)
    return Share(kind=name, callers=int(callers or 1))


def _scaled(shares: tuple[Share, ...], concurrency: int) -> tuple[Share, ...]:
    """Hands out callers by largest remainder, one to each kind at least."""
    total = sum(share.callers for share in shares)
    exact = [share.callers * concurrency / total for share in shares]
    counts = [max(int(number), 1) for number in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: int(exact[i]) - exact[i])
    for index in by_remainder[: max(concurrency - sum(counts), 0)]:
        counts[index] += 1
    return tuple(replace(share, callers=count) for share, count in zip(shares, counts, strict=True))


def _refused(message: str, value: str) -> InvalidInputError:
    return InvalidInputError(Reason.INVALID_OPTION, message, field="mix", value=value)
