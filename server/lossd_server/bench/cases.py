"""The table of cases."""

from collections.abc import Sequence

from lossd_server.bench.assign_cases import assign_cases
from lossd_server.bench.case import CaseSpec
from lossd_server.bench.head_cases import head_cases
from lossd_server.bench.loss_cases import loss_cases
from lossd_server.bench.option_cases import option_cases
from lossd_server.bench.queue_cases import queue_cases
from lossd_server.bench.transport_cases import stream_cases, transport_cases
from lossd_server.errors import InvalidInputError, Reason

CASES: tuple[CaseSpec, ...] = (
    *loss_cases(),
    *assign_cases(),
    *queue_cases(),
    *transport_cases(),
    *head_cases(),
    *stream_cases(),
    *option_cases(),
)
"""Every case, in the order in which they run."""


def select(names: Sequence[str], *, quick: bool, coco: bool = False, gpu: bool = False) -> list[CaseSpec]:
    """Returns the cases that are asked for.

    Args:
        names: Whole names, or their beginnings up to a dash: `focal` is every focal case. None at
            all means all cases.
        quick: Leaves out the large ones that are not named in full.
        coco: Whether there is an annotation file; without one, the cases that need it are left out.
        gpu: Whether a GPU evaluates; if not, the cases that need one are left out.

    Raises:
        InvalidInputError: A name is of no case, or of one that needs an annotation file or a GPU.
    """
    for name in names:
        if not any(_goes_by(spec, name) for spec in CASES):
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"is {name!r}, want one of {', '.join(spec.name for spec in CASES)}",
                field="names",
                value=name,
            )
    chosen = [spec for spec in CASES if not names or any(_goes_by(spec, name) for name in names)]
    for spec in chosen:
        lacks = [
            *(["--coco"] if spec.needs_coco and not coco else []),
            *(["--device cuda"] if spec.needs_gpu and not gpu else []),
        ]
        if lacks and spec.name in names:
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"{spec.name} needs {' and '.join(lacks)}",
                field="names",
                value=spec.name,
            )
    chosen = [spec for spec in chosen if (coco or not spec.needs_coco) and (gpu or not spec.needs_gpu)]
    return [spec for spec in chosen if not (quick and spec.large) or spec.name in names]


def _goes_by(spec: CaseSpec, name: str) -> bool:
    return spec.name == name or spec.name.startswith(f"{name}-")
