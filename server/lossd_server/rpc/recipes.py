"""How requests of one form become jobs, settled by the first of them.

Their tensors have the same types, shapes and sizes, which were found to go together then. What they hold is
read and checked in each.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossd.wire import Payloads
from lossd_server.engine import AssignItem, AssignJob, LossItem, LossJob
from lossd_server.engine.steps import Load
from lossd_server.errors import errors_within
from lossd_server.losses import EvaluationOptions, LossModule
from lossd_server.rpc.plans import AssignPlan, LossPlan
from lossd_server.rpc.sources import Source
from lossd_server.targets import GroundTruth
from lossd_server.targets.pyramid import Pyramid


class _Tensor(NamedTuple):
    """A tensor in the message: its type and shape, and which payload it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    payload: int

    @classmethod
    def of(cls, source: Any, payloads: Payloads) -> "_Tensor | None":
        """Returns the tensor of a source; None of levels and objects, and where each is to be looked at."""
        if not isinstance(source, Source) or source.is_shared or source.dtype.kind == "b":
            return None
        payload = payloads.place_of(source.tensor.inline)
        return None if payload is None else cls(source.dtype, source.shape, payload)

    def array(self, payloads: Payloads) -> NDArray[Any]:
        """Returns the array of a request."""
        return np.ndarray(self.shape, self.dtype, payloads.buffers[self.payload])


class _Evaluation(NamedTuple):
    """A `PlannedEvaluation` of tensors in the message; None stands for arguments that are not given."""

    path: str
    tensors: Mapping[str, _Tensor | None]
    options: EvaluationOptions


class LossRecipe:
    """What becomes of the requests of a form.

    Attributes:
        load: What each asks of the device.
    """

    __slots__ = ("_items", "_loss", "_strict", "load")

    def __init__(self, loss: LossModule, items: Sequence[_Evaluation], load: Load, *, strict: bool) -> None:
        self.load = load
        self._loss = loss
        self._items = items
        self._strict = strict

    @classmethod
    def of(cls, plan: LossPlan, payloads: Payloads, load: Load) -> "LossRecipe | None":
        """Returns the recipe of a form; None where there is more to it than tensors in the message.

        Args:
            plan: Its plan.
            payloads: Those of a request that was read without fault.
            load: That of its job.
        """
        if not isinstance(plan.loss, LossModule) or any(planned.has_outputs for planned in plan.items):
            return None
        items = []
        for planned in plan.items:
            given = {name: source for name, source in planned.sources.items() if source is not None}
            tensors = {name: _Tensor.of(source, payloads) for name, source in given.items()}
            if None in tensors.values():
                return None
            absent = dict.fromkeys(planned.sources.keys() - given.keys())
            items.append(_Evaluation(planned.path, {**tensors, **absent}, planned.options))
        return cls(plan.loss, items, load, strict=plan.strict)

    def job(self, payloads: Payloads) -> LossJob:
        """Returns the checked work of a request.

        Raises:
            InvalidInputError: A value is refused.
        """
        loss, items = self._loss, []
        for path, tensors, options in self._items:
            arguments: dict[str, Any] = {}
            for name, tensor in tensors.items():
                arguments[name] = None if tensor is None else tensor.array(payloads)
            with errors_within(path):
                items.append(LossItem(path, loss.read(arguments), options))
        return LossJob(loss, items, self._strict)


class _Assignment(NamedTuple):
    """A `PlannedAssignment` of tensors in the message: boxes and labels of each image."""

    path: str
    images: Sequence[tuple[_Tensor, _Tensor]]
    levels: Pyramid


class AssignRecipe:
    """What becomes of the requests of a form that have no crowd regions."""

    __slots__ = ("_items", "_job")

    def __init__(self, items: Sequence[_Assignment], job: AssignJob) -> None:
        self._items = items
        self._job = job

    @classmethod
    def of(cls, plan: AssignPlan, payloads: Payloads, job: AssignJob) -> "AssignRecipe | None":
        """Returns the recipe of a form; None where there is more to it, as for `LossRecipe`.

        Args:
            plan: Its plan.
            payloads: Those of a request that was read without fault.
            job: Its job.
        """
        items = []
        for planned in plan.items:
            images = []
            for boxes, labels, iscrowd in planned.sources:
                pair = _Tensor.of(boxes, payloads), _Tensor.of(labels, payloads)
                if iscrowd is not None or pair[0] is None or pair[1] is None:
                    return None
                images.append((pair[0], pair[1]))
            items.append(_Assignment(planned.path, images, planned.levels))
        return cls(items, job._replace(items=[]))

    def job(self, payloads: Payloads) -> AssignJob:
        """Returns the checked work of a request.

        Raises:
            InvalidInputError: A value is refused.
        """
        job, items = self._job, []
        for path, images, levels in self._items:
            objects = [GroundTruth(boxes.array(payloads), labels.array(payloads)) for boxes, labels in images]
            with errors_within(path):
                items.append(AssignItem(path, job.assigner.read(objects), levels))
        return job._replace(items=items)
