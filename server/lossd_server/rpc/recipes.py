"""How requests of one form become jobs: settled by the first of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lossd.wire import Payloads
from lossd_server.engine import LossItem, LossJob
from lossd_server.engine.steps import Load
from lossd_server.errors import LossdError
from lossd_server.losses import EvaluationOptions, LossModule
from lossd_server.rpc.plans import LossPlan, PlannedEvaluation
from lossd_server.rpc.sources import Source


class _Tensor(NamedTuple):
    """An argument: its name, its type and shape, and which payload it is."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    payload: int


class _Item(NamedTuple):
    """An item: a `PlannedEvaluation` whose arguments are tensors in the message, or absent."""

    path: str
    tensors: Sequence[_Tensor]
    absent: Mapping[str, None]
    options: EvaluationOptions


class Recipe:
    """What is done with the requests of a form, less what was done with the first of them.

    Their tensors have the same types, shapes and sizes, which were found to go together. What they hold is
    read and checked in each.

    Attributes:
        load: What each asks of the device.
    """

    __slots__ = ("_items", "_loss", "_strict", "load")

    def __init__(self, loss: LossModule, items: Sequence[_Item], load: Load, *, strict: bool) -> None:
        self.load = load
        self._loss = loss
        self._items = items
        self._strict = strict

    @classmethod
    def of(cls, plan: LossPlan, payloads: Payloads, load: Load) -> "Recipe | None":
        """Returns the recipe of a form; None where there is more to it than tensors in the message.

        Args:
            plan: Its plan.
            payloads: Those of a request that was read without fault.
            load: That of its job.
        """
        if not isinstance(plan.loss, LossModule):
            return None
        items = []
        for planned in plan.items:
            item = None if planned.has_outputs else _item(planned, payloads)
            if item is None:
                return None
            items.append(item)
        return cls(plan.loss, items, load, strict=plan.strict)

    def job(self, payloads: Payloads) -> LossJob:
        """Returns the checked work of a request.

        Raises:
            InvalidInputError: A value is refused.
        """
        loss, items = self._loss, []
        for path, tensors, absent, options in self._items:
            arguments: dict[str, Any] = {**absent}
            for name, dtype, shape, payload in tensors:
                arguments[name] = np.ndarray(shape, dtype, payloads.buffers[payload])
            try:
                items.append(LossItem(path, loss.read(arguments), options))
            except LossdError as error:
                error.prefix_field(path)
                raise
        return LossJob(loss, items, self._strict)


def _item(planned: PlannedEvaluation, payloads: Payloads) -> _Item | None:
    """Returns an item; None where it has levels, objects, bools, or anything that is no payload."""
    tensors = []
    for name, source in planned.sources.items():
        if source is None:
            continue
        if not isinstance(source, Source) or source.is_shared or source.dtype.kind == "b":
            return None
        payload = payloads.place_of(source.tensor.inline)
        if payload is None:
            return None
        tensors.append(_Tensor(name, source.dtype, source.shape, payload))
    return _Item(
        path=planned.path,
        tensors=tensors,
        absent={name: None for name, source in planned.sources.items() if source is None},
        options=planned.options,
    )
