"""How requests of one form become jobs, settled by the first of them.

Their tensors have the same types, shapes and sizes, which were found to go together then. What they hold is
read and checked in each.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Payloads
from lossd_server.engine import AssignItem, AssignJob, LossItem, LossJob
from lossd_server.engine.steps import Load
from lossd_server.errors import errors_within
from lossd_server.losses import EvaluationOptions, LossModule
from lossd_server.rpc.outputs import Place, Places, places_of
from lossd_server.rpc.plans import AssignPlan, LossPlan
from lossd_server.rpc.sources import Source, is_read_in_place
from lossd_server.shared_memory import AnyArray, Regions, Slices
from lossd_server.targets import GroundTruth
from lossd_server.targets.pyramid import Pyramid

_NO_SLICES = Slices(None)


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

    def array(self, payloads: Payloads, _slices: Slices = _NO_SLICES) -> NDArray[Any]:
        """Returns the array of a request."""
        return np.ndarray(self.shape, self.dtype, payloads.buffers[self.payload])


class _SharedTensor(NamedTuple):
    """A tensor in shared memory.

    Attributes:
        field: Where it stands, for errors.
        place: Where it lies, if it still does: that is looked up for each request.
        dtype: Its type.
        shape: Its shape.
        in_place: Whether it is read where it lies.
    """

    field: str
    place: Place
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    in_place: bool

    @classmethod
    def of(cls, source: Any, predictions: Collection[str]) -> "_SharedTensor | None":
        """Returns the tensor of a source; None of levels, objects and bools, and if it is in the message."""
        if not isinstance(source, Source) or not source.is_shared or source.dtype.kind == "b":
            return None
        place = source.tensor.shared.region_id, source.tensor.shared.offset
        in_place = is_read_in_place(source, predictions)
        return cls(source.field, place, source.dtype, source.shape, in_place)

    def array(self, _payloads: Payloads, slices: Slices) -> AnyArray:
        """Returns the array of a request; raises `InvalidInputError` where the memory is gone."""
        with errors_within(self.field):
            return slices.read(*self.place, self.dtype, self.shape, in_place=self.in_place)


class _Output(NamedTuple):
    """Where a gradient, or a level of one, is written; the path is that of its place in the request."""

    path: str
    place: Place
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def array(self, slices: Slices) -> AnyArray:
        """Returns the array of a request; raises `InvalidInputError` where the memory is gone."""
        with errors_within(self.path):
            return slices.write(self.path, *self.place, self.dtype, self.shape)


class _Evaluation(NamedTuple):
    """A `PlannedEvaluation` of plain tensors; None stands for arguments that are not given."""

    path: str
    tensors: Mapping[str, _Tensor | _SharedTensor | None]
    options: EvaluationOptions
    outputs: Mapping[str, Sequence[_Output]]


class LossRecipe:
    """What becomes of the requests of a form.

    Attributes:
        load: What each asks of the device.
        places: Where the gradients of each item are written, as far as that is in shared memory.
    """

    __slots__ = ("_items", "_loss", "_shares_memory", "_strict", "load", "places")

    def __init__(
        self,
        loss: LossModule,
        items: Sequence[_Evaluation],
        places: Sequence[Places],
        load: Load,
        *,
        strict: bool,
    ) -> None:
        self.load = load
        self.places = places
        self._loss = loss
        self._items = items
        self._strict = strict
        tensors = chain.from_iterable(item.tensors.values() for item in items)
        self._shares_memory = any(places) or any(isinstance(each, _SharedTensor) for each in tensors)

    @classmethod
    def of(
        cls, plan: LossPlan, payloads: Payloads, message: pb.ComputeLossRequest, job: LossJob, load: Load
    ) -> "LossRecipe | None":
        """Returns the recipe of a form; None where there are levels in it, or objects.

        Args:
            plan: Its plan.
            payloads: Those of a request that was read without fault.
            message: The message of all of its requests.
            job: The job of that request.
            load: What it asks of the device.
        """
        if not isinstance(plan.loss, LossModule):
            return None
        predictions, items = plan.loss.differentiable, []
        for index, planned in enumerate(plan.items):
            given = {name: source for name, source in planned.sources.items() if source is not None}
            tensors = {
                name: _Tensor.of(source, payloads) or _SharedTensor.of(source, predictions)
                for name, source in given.items()
            }
            if None in tensors.values():
                return None
            absent = dict.fromkeys(planned.sources.keys() - given.keys())
            outputs = _outputs(index, message.items[index], job.items[index])
            items.append(_Evaluation(planned.path, {**tensors, **absent}, planned.options, outputs))
        places = [*map(places_of, message.items)]
        return cls(plan.loss, items, places, load, strict=plan.strict)

    def job(self, payloads: Payloads, regions: Regions | None) -> LossJob:
        """Returns the checked work of a request.

        Args:
            payloads: Those of the request.
            regions: The shared memory that it may name; None where its caller can have passed none.

        Raises:
            InvalidInputError: A value is refused, or memory is gone.
        """
        slices = Slices(regions) if self._shares_memory else _NO_SLICES
        loss, items = self._loss, []
        for path, tensors, options, outputs in self._items:
            arguments: dict[str, Any] = {}
            with errors_within(path):
                for name, tensor in tensors.items():
                    arguments[name] = None if tensor is None else tensor.array(payloads, slices)
                item = LossItem(path, loss.read(arguments), options)
            if outputs:
                written = {name: [each.array(slices) for each in some] for name, some in outputs.items()}
                item = item._replace(outputs=written)
            items.append(item)
        if not self._shares_memory:
            return LossJob(loss, items, self._strict)
        slices.check_overlaps()
        return LossJob(loss, items, self._strict, slices.owner())


def _outputs(index: int, message: pb.LossItem, item: LossItem) -> dict[str, list[_Output]]:
    """Returns where the gradients of an item are written, given its job in a request without fault."""
    return {
        output.input: [
            _Output(
                path=f"items[{index}].outputs[{order}].slices[{level}]",
                place=(wanted.region_id, wanted.offset),
                dtype=array.dtype,
                shape=tuple(array.shape),
            )
            for level, (wanted, array) in enumerate(
                zip(output.slices, item.outputs[output.input], strict=True)
            )
        ]
        for order, output in enumerate(message.outputs)
    }


class _Assignment(NamedTuple):
    """A `PlannedAssignment` of tensors in the message: of each image its field, its boxes and labels."""

    path: str
    images: Sequence[tuple[str, _Tensor, _Tensor]]
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
            for index, (boxes, labels, iscrowd) in enumerate(planned.sources):
                found = _Tensor.of(boxes, payloads), _Tensor.of(labels, payloads)
                if iscrowd is not None or found[0] is None or found[1] is None:
                    return None
                images.append((f"ground_truth[{index}]", found[0], found[1]))
            items.append(_Assignment(planned.path, images, planned.levels))
        return cls(items, job._replace(items=[]))

    def job(self, payloads: Payloads) -> AssignJob:
        """Returns the checked work of a request.

        Raises:
            InvalidInputError: A value is refused.
        """
        assigner, _, max_positives, answer_bytes = self._job
        items = []
        for path, images, levels in self._items:
            objects = []
            with errors_within(path):
                for field, boxes, labels in images:
                    image = GroundTruth(boxes.array(payloads), labels.array(payloads))
                    objects.append(assigner.read_image(image, field))
            items.append(AssignItem(path, objects, levels))
        return AssignJob(assigner, items, max_positives, answer_bytes)
