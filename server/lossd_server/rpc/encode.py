"""From outcomes to messages, each written in its place in the answer: put in later, it would be copied."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from lossd.narrow import narrowed_integers
from lossd.sparse import is_smaller, pack_sparse
from lossd.tensors import put, put_shared
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd_server.engine import LossOutcome
from lossd_server.rpc.enums import ASSIGNER_PRESETS, LOSS_PRESETS, number_of
from lossd_server.targets import AssignerPreset, Assignment, DenseLevel, SparseTargets
from lossd_server.targets.pyramid import Pyramid

_SPARSE_FORMATS = {pb.TARGET_FORMAT_SPARSE, pb.TARGET_FORMAT_SMALLER}

_NARROWED_BYTES = 7
"""What a label loses at most: of eight bytes."""

_COUNTS = {"valid_count", "positive_count"}


def write_loss_result(
    outcome: LossOutcome, result: pb.LossResult, payloads: Payloads, outputs: Iterable[pb.GradientOutput] = ()
) -> None:
    """Writes one evaluation.

    Args:
        outcome: What the engine found.
        result: Its empty place in the answer.
        payloads: Where large tensors go.
        outputs: Where gradients were written, which are not sent then.
    """
    places = {output.input: output.slices for output in outputs}
    put(outcome.loss, result.loss, payloads)
    for name, value, weight in outcome.components:
        result.components.add(name=name, value=value, weight=weight)
    result.positive_count = outcome.positive_count
    for level in outcome.raw_sums:
        numbers = {name: int(v) if name in _COUNTS else v for name, v in level.items()}
        result.raw_sums.add(**numbers)
    for name in outcome.gradients:
        _write_gradient(name, outcome, result.gradients.add(input=name), payloads, places.get(name))
    if outcome.kept_rows is not None:
        put(outcome.kept_rows, result.kept_rows, payloads)
    for found in outcome.non_finite:
        result.non_finite.add(input=found.input, count=found.count, first_index=found.first_index)
    result.negative_side_count = outcome.negative_side_count
    if outcome.preset is not None:
        result.preset = number_of(LOSS_PRESETS, outcome.preset)


def _write_gradient(
    name: str,
    outcome: LossOutcome,
    gradient: pb.Gradient,
    payloads: Payloads,
    places: Iterable[tensor_pb2.SharedSlice] | None,
) -> None:
    if places is not None:
        for array, place in zip(outcome.gradients[name], places, strict=True):
            put_shared(array, gradient.tensors.add(), place)
        return
    arrays = [array for array in outcome.gradients[name] if isinstance(array, np.ndarray)]
    rows = outcome.nonzero_rows.get(name)
    if rows is not None and is_smaller(arrays, rows):
        gradient.sparse.extend(pack_sparse(*level, payloads) for level in zip(arrays, rows, strict=True))
    else:
        for array in arrays:
            put(array, gradient.tensors.add(), payloads)


def write_target_result(
    assignment: Assignment,
    result: pb.TargetResult,
    payloads: Payloads,
    *,
    target_format: int,
    preset: AssignerPreset,
    narrow: bool,
) -> None:
    """Writes one item's targets, in the form asked for; large ones go to the payloads.

    Args:
        assignment: The targets.
        result: Their empty place in the answer.
        payloads: Where large tensors go.
        target_format: A `TargetFormat`.
        preset: Whose rules were followed.
        narrow: Whether integers may go in fewer bytes.
    """
    targets = _targets(assignment, target_format, narrow=narrow)
    if isinstance(targets, SparseTargets):
        _write_sparse(targets, result.sparse, payloads)
    else:
        result.dense.SetInParent()
        for level in targets:
            _write_level(level, result.dense.levels.add(), payloads)
    result.positive_counts.extend(assignment.positive_counts())
    result.feature_sizes.extend(_sizes(assignment.pyramid))
    result.preset = number_of(ASSIGNER_PRESETS, preset)


@lru_cache(maxsize=256)
def _sizes(pyramid: Pyramid) -> list[pb.Size]:
    """Returns the level sizes of a pyramid, to be copied into messages; there are few pyramids."""
    return [pb.Size(height=height, width=width) for height, width in pyramid.sizes]


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
    if not narrow:
        return targets
    return targets._replace(
        locations=narrowed_integers(targets.locations),
        labels=narrowed_integers(targets.labels),
        matched=narrowed_integers(targets.matched),
        ignored=narrowed_integers(targets.ignored),
    )


def _bytes_of(targets: SparseTargets | DenseLevel) -> int:
    return sum(array.nbytes for array in targets if array is not None)


def _write_level(targets: DenseLevel, level: pb.DenseLevel, payloads: Payloads) -> None:
    put(targets.cls, level.cls, payloads)
    put(targets.reg, level.reg, payloads)
    put(targets.centerness, level.centerness, payloads)
    if targets.ignored is not None:
        put(targets.ignored, level.ignored, payloads)


def _write_sparse(targets: SparseTargets, sparse: pb.SparseTargets, payloads: Payloads) -> None:
    put(targets.locations, sparse.locations, payloads)
    put(targets.labels, sparse.labels, payloads)
    put(targets.ltrb, sparse.ltrb, payloads)
    put(targets.centerness, sparse.centerness, payloads)
    put(targets.matched, sparse.matched, payloads)
    put(targets.ignored, sparse.ignored, payloads)
