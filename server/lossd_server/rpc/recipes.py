"""How requests of one form become jobs, and what comes of these answers: settled by the first of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lossd.answers import ResultLayout
from lossd.wire import LARGE_BYTES, Payloads
from lossd.writing import Piece
from lossd_server.engine import LossItem, LossJob
from lossd_server.engine.steps import Load
from lossd_server.errors import LossdError
from lossd_server.losses import EvaluationOptions, LossModule, LossOutcome, Reduction
from lossd_server.losses.arrays import PLAIN_GRADIENTS, gradient_dtype
from lossd_server.rpc import encode
from lossd_server.rpc.plans import LossPlan, PlannedEvaluation
from lossd_server.rpc.sources import Source


class _Tensor(NamedTuple):
    """An argument: its name, its type and shape, and which payload it is."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    payload: int


class _Item(NamedTuple):
    """An item: what a `PlannedEvaluation` says of it, and the layout of its result if that is a usual one."""

    path: str
    tensors: Sequence[_Tensor]
    absent: Mapping[str, None]
    options: EvaluationOptions
    layout: ResultLayout | None


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
            item = None if planned.has_outputs else _item(plan.loss, planned, payloads)
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
        for path, tensors, absent, options, _ in self._items:
            arguments: dict[str, Any] = {**absent}
            for name, dtype, shape, payload in tensors:
                arguments[name] = np.ndarray(shape, dtype, payloads.buffers[payload])
            try:
                items.append(LossItem(path, loss.read(arguments), options))
            except LossdError as error:
                error.prefix_field(path)
                raise
        return LossJob(loss, items, self._strict)

    def results(self, outcomes: Sequence[LossOutcome]) -> list[Piece]:
        """Returns the results of an answer: to the byte what `encode.loss_results` makes of outcomes."""
        pieces: list[Piece] = []
        for item, outcome in zip(self._items, outcomes, strict=True):
            if item.layout is None:
                pieces += encode.loss_results([outcome], [()])
                continue
            gradients = [array for (array,) in outcome.gradients.values() if isinstance(array, np.ndarray)]
            pieces += item.layout.pieces(encode.about(outcome), outcome.loss, *gradients)
        return pieces


def _item(loss: LossModule, planned: PlannedEvaluation, payloads: Payloads) -> _Item | None:
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
        layout=_layout(loss, planned),
    )


def _layout(loss: LossModule, planned: PlannedEvaluation) -> ResultLayout | None:
    """Returns the layout of a result; None where it is of one number a row, or large."""
    options = planned.options
    if loss.reduction is Reduction.NONE or options.gradient_dtype not in PLAIN_GRADIENTS:
        return None
    (name,) = loss.differentiable
    prediction = planned.sources[name]
    layout = ResultLayout.of(prediction.dtype)
    if options.gradients:
        dtype = gradient_dtype(prediction.dtype, options.gradient_dtype)
        layout = layout.with_gradient(name, dtype, prediction.shape)
    return layout if layout.gradient_size < LARGE_BYTES else None
