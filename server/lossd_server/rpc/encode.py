"""From outcomes to messages, each written in its place in the answer: put in later, it would be copied."""

from collections.abc import Callable, Iterable
from functools import lru_cache

from lossd.narrow import narrowed_integers
from lossd.sparse import is_smaller, pack_sparse
from lossd.tensors import Array, put, put_shared
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd_server.engine import LossOutcome
from lossd_server.rpc.enums import ASSIGNER_PRESETS, LOSS_PRESETS, number_of
from lossd_server.targets import AssignerPreset, Assignment, DenseLevel, SparseTargets
from lossd_server.targets.pyramid import Pyramid

_Put = Callable[[Array, tensor_pb2.Tensor, Payloads], None]

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
    arrays, rows = outcome.gradients[name], outcome.nonzero_rows.get(name)
    if places is not None:
        for array, place in zip(arrays, places, strict=True):
            put_shared(array, gradient.tensors.add(), place)
    elif rows is not None and is_smaller(arrays, rows):
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
    put_integers = _put_narrowed if narrow else put
    sparse = target_format == pb.TARGET_FORMAT_SPARSE
    if target_format == pb.TARGET_FORMAT_SMALLER:
        sparse = assignment.is_smaller_sparse()
    if sparse:
        _write_sparse(assignment.sparse(), result.sparse, payloads, put_integers)
    else:
        result.dense.SetInParent()
        for level in assignment.dense():
            _write_level(level, result.dense.levels.add(), payloads, put_integers)
    result.positive_counts.extend(assignment.positive_counts())
    result.feature_sizes.extend(_sizes(assignment.pyramid))
    result.preset = number_of(ASSIGNER_PRESETS, preset)


@lru_cache(maxsize=256)
def _sizes(pyramid: Pyramid) -> list[pb.Size]:
    """Returns the level sizes of a pyramid, to be copied into messages; there are few pyramids."""
    return [pb.Size(height=height, width=width) for height, width in pyramid.sizes]


def _write_level(targets: DenseLevel, level: pb.DenseLevel, payloads: Payloads, put_integers: _Put) -> None:
    put_integers(targets.cls, level.cls, payloads)
    put(targets.reg, level.reg, payloads)
    put(targets.centerness, level.centerness, payloads)
    if targets.ignored is not None:
        put(targets.ignored, level.ignored, payloads)


def _write_sparse(
    targets: SparseTargets, sparse: pb.SparseTargets, payloads: Payloads, put_integers: _Put
) -> None:
    put_integers(targets.locations, sparse.locations, payloads)
    put_integers(targets.labels, sparse.labels, payloads)
    put(targets.ltrb, sparse.ltrb, payloads)
    put(targets.centerness, sparse.centerness, payloads)
    put_integers(targets.matched, sparse.matched, payloads)
    put_integers(targets.ignored, sparse.ignored, payloads)


def _put_narrowed(array: Array, tensor: tensor_pb2.Tensor, payloads: Payloads) -> None:
    put(narrowed_integers(array), tensor, payloads)
