"""From outcomes to the messages of answers, in pieces that refer to the arrays; see `lossd.writing`."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lossd.answers import result_layout, shared_result_layout
from lossd.narrow import narrowed_integers
from lossd.scalars import Scalars
from lossd.sparse import is_smaller, sparse_tensor_field
from lossd.target_answers import has_layout, targets_layout
from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import varint
from lossd.wire import LARGE_BYTES, Buffer
from lossd.writing import Piece, message_field, shared_tensor_field, tags_of, tensor_field
from lossd_server.losses import LossOutcome, NonFinite
from lossd_server.rpc.enums import ASSIGNER_PRESETS, LOSS_PRESETS, number_of
from lossd_server.rpc.outputs import NOWHERE, Place, Places
from lossd_server.targets import BYTES_OF_POSITIVE, AssignerPreset, Assignment, DenseLevel, SparseTargets
from lossd_server.targets.pyramid import Pyramid

_SPARSE_FORMATS = {pb.TARGET_FORMAT_SPARSE, pb.TARGET_FORMAT_SMALLER}

_NARROWED_BYTES = 7
"""What a label loses at most: of eight bytes."""

_LOSS_RESULTS = tags_of(pb.ComputeLossResponse.DESCRIPTOR)["results"]
_LOSS_RESULT = tags_of(pb.LossResult.DESCRIPTOR)
_NUMBERS = Scalars(pb.LossResult.DESCRIPTOR)
_COMPONENT = Scalars(pb.LossComponent.DESCRIPTOR)
_RAW_SUMS = Scalars(pb.RawSums.DESCRIPTOR)
_GRADIENT = tags_of(pb.Gradient.DESCRIPTOR)
_TARGET_RESULT = tags_of(pb.TargetResult.DESCRIPTOR)
_SPARSE = tags_of(pb.SparseTargets.DESCRIPTOR)
_DENSE = tags_of(pb.DenseTargets.DESCRIPTOR)
_DENSE_LEVEL = tags_of(pb.DenseLevel.DESCRIPTOR)


def loss_results(outcomes: Iterable[LossOutcome], places: Iterable[Places]) -> list[Piece]:
    """Returns the results of evaluations as fields of an answer; arguments as for `loss_result`, of each."""
    pieces: list[Piece] = []
    for found, written in zip(outcomes, places, strict=True):
        usual = _usual_result(found, written)
        pieces += usual or message_field(_LOSS_RESULTS, loss_result(found, written))
    return pieces


def _usual_result(outcome: LossOutcome, places: Places) -> list[Buffer] | None:
    """Returns a result in its usual layout, as a field; None where it has none."""
    loss = outcome.loss
    if loss.shape or outcome.kept_rows is not None or outcome.nonzero_rows or len(outcome.gradients) > 1:
        return None
    if not outcome.gradients:
        return result_layout(loss.dtype).pieces(_about(outcome), loss)
    ((name, arrays),) = outcome.gradients.items()
    if len(arrays) > 1:
        return None
    gradient = arrays[0]
    if name in places:
        layout = shared_result_layout(loss.dtype, name, gradient.dtype, gradient.shape, *places[name][0])
        return layout.pieces(_about(outcome), loss)
    if not isinstance(gradient, np.ndarray) or gradient.nbytes >= LARGE_BYTES:
        return None
    layout = result_layout(loss.dtype, name, gradient.dtype, gradient.shape)
    return layout.pieces(_about(outcome), loss, gradient)


def loss_result(outcome: LossOutcome, places: Places = NOWHERE) -> list[Piece]:
    """Returns the `LossResult` of one evaluation.

    Args:
        outcome: What the engine found.
        places: Where gradients were written, which are not sent then.
    """
    pieces: list[Piece] = [_about(outcome), *tensor_field(_LOSS_RESULT["loss"], outcome.loss)]
    for name in outcome.gradients:
        pieces += message_field(_LOSS_RESULT["gradients"], _gradient(name, outcome, places.get(name)))
    if outcome.kept_rows is not None:
        pieces += tensor_field(_LOSS_RESULT["kept_rows"], outcome.kept_rows)
    return pieces


def _about(outcome: LossOutcome) -> bytes:
    """Returns what a `LossResult` holds beside tensors."""
    numbers: dict[str, float] = {
        "positive_count": outcome.positive_count,
        "negative_side_count": outcome.negative_side_count,
    }
    if outcome.preset is not None:
        numbers["preset"] = number_of(LOSS_PRESETS, outcome.preset)
    pieces: list[Piece] = [_NUMBERS.write(numbers)]
    for name, value, weight in outcome.components:
        component = [_about_component(name), _COMPONENT.write({"value": value, "weight": weight})]
        pieces += message_field(_LOSS_RESULT["components"], component)
    for level in outcome.raw_sums:
        pieces += message_field(_LOSS_RESULT["raw_sums"], [_RAW_SUMS.write(level)])
    if outcome.non_finite:
        pieces.append(_about_non_finite(outcome.non_finite))
    return b"".join(pieces)  # type: ignore[arg-type]  # nothing of it is large


@lru_cache(maxsize=256)
def _about_component(name: str) -> bytes:
    """Returns what a component holds beside numbers; there are few names."""
    return pb.LossComponent(name=name).SerializeToString()


def _about_non_finite(found: Iterable[NonFinite]) -> bytes:
    inputs = [
        pb.NonFinite(input=each.input, count=each.count, first_index=each.first_index) for each in found
    ]
    return pb.LossResult(non_finite=inputs).SerializeToString()


@lru_cache(maxsize=256)
def _about_gradient(name: str) -> bytes:
    """Returns what a gradient holds beside tensors; there are few names."""
    return pb.Gradient(input=name).SerializeToString()


def _gradient(name: str, outcome: LossOutcome, places: Sequence[Place] | None) -> list[Piece]:
    pieces: list[Piece] = [_about_gradient(name)]
    if places is not None:
        for held, place in zip(outcome.gradients[name], places, strict=True):
            pieces.append(shared_tensor_field(_GRADIENT["tensors"], held.dtype, held.shape, *place))
        return pieces
    arrays = [array for array in outcome.gradients[name] if isinstance(array, np.ndarray)]
    rows = outcome.nonzero_rows.get(name)
    if rows is not None and is_smaller(arrays, rows):
        for level in zip(arrays, rows, strict=True):
            pieces += sparse_tensor_field(_GRADIENT["sparse"], *level)
    else:
        for array in arrays:
            pieces += tensor_field(_GRADIENT["tensors"], array)
    return pieces


def target_result(
    assignment: Assignment, *, target_format: int, preset: AssignerPreset, narrow: bool
) -> list[Piece]:
    """Returns the `TargetResult` of one item, in the form asked for.

    Args:
        assignment: The targets.
        target_format: A `TargetFormat`.
        preset: Whose rules were followed.
        narrow: Whether integers may go in fewer bytes.
    """
    counts = message_field(_TARGET_RESULT["positive_counts"], [*map(varint, assignment.positive_counts())])
    pieces: list[Piece] = [_about_targets(assignment.pyramid, preset), *counts]
    if _are_usual(assignment, target_format):
        return _usual_targets(assignment) + pieces
    targets = _targets(assignment, target_format, narrow=narrow)
    if isinstance(targets, SparseTargets):
        return pieces + message_field(_TARGET_RESULT["sparse"], _tensors(_SPARSE, targets))
    levels: list[Piece] = []
    for level in targets:
        levels += message_field(_DENSE["levels"], _tensors(_DENSE_LEVEL, level))
    return pieces + message_field(_TARGET_RESULT["dense"], levels)


@lru_cache(maxsize=256)
def _about_targets(pyramid: Pyramid, preset: AssignerPreset) -> bytes:
    """Returns what all results of a pyramid have in common; there are few pyramids."""
    sizes = [pb.Size(height=height, width=width) for height, width in pyramid.sizes]
    about = pb.TargetResult(feature_sizes=sizes, preset=number_of(ASSIGNER_PRESETS, preset))
    return about.SerializeToString()


def _are_usual(assignment: Assignment, target_format: int) -> bool:
    """Whether targets go in their usual layout: those of few locations, and none of them ignored."""
    count = assignment.positive_count
    if assignment.ignored is not None or not has_layout(count):
        return False
    if target_format == pb.TARGET_FORMAT_SMALLER:
        least = assignment.dense_bytes - assignment.location_count * _NARROWED_BYTES
        return count * BYTES_OF_POSITIVE < least
    return target_format == pb.TARGET_FORMAT_SPARSE


def _usual_targets(assignment: Assignment) -> list[Piece]:
    found = assignment.found
    arrays = found.cells, found.labels, found.ltrb, found.centerness, found.matched
    return [*targets_layout(len(found.labels)).pieces(arrays)]


def _targets(assignment: Assignment, target_format: int, *, narrow: bool) -> SparseTargets | list[DenseLevel]:
    """Returns the targets in the form asked for."""
    if target_format not in _SPARSE_FORMATS:
        return _dense(assignment, narrow=narrow)
    sparse = _sparse(assignment, narrow=narrow)
    if target_format == pb.TARGET_FORMAT_SPARSE:
        return sparse
    size, most = _bytes_of(sparse), assignment.dense_bytes
    if size < (most - assignment.location_count * _NARROWED_BYTES if narrow else most):
        return sparse
    if size >= most:
        return _dense(assignment, narrow=narrow)
    dense = _dense(assignment, narrow=True)  # whose size its labels decide
    return sparse if size < sum(map(_bytes_of, dense)) else dense


def _dense(assignment: Assignment, *, narrow: bool) -> list[DenseLevel]:
    levels = assignment.dense()
    return [level._replace(cls=narrowed_integers(level.cls)) for level in levels] if narrow else levels


def _sparse(assignment: Assignment, *, narrow: bool) -> SparseTargets:
    targets = assignment.sparse()
    return SparseTargets(*(narrowed_integers(array) for array in targets)) if narrow else targets


def _bytes_of(targets: SparseTargets | DenseLevel) -> int:
    return sum(array.nbytes for array in targets if array is not None)


def _tensors(tags: dict[str, bytes], targets: Any) -> list[Piece]:
    """Returns the message of targets whose fields are named as those of their tuple are."""
    pieces: list[Piece] = []
    for name, array in zip(targets._fields, targets, strict=True):
        if array is not None:
            pieces += tensor_field(tags[name], array)
    return pieces
