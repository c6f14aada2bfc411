"""From outcomes to messages."""

from collections.abc import Iterable
from functools import lru_cache

from lossd.sparse import is_smaller, pack_sparse
from lossd.tensors import pack, pack_shared
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd_server.engine import LossOutcome
from lossd_server.rpc.enums import ASSIGNER_PRESETS, LOSS_PRESETS, number_of
from lossd_server.targets import AssignerPreset, Assignment, DenseLevel, SparseTargets
from lossd_server.targets.pyramid import Pyramid

_COUNTS = {"valid_count", "positive_count"}


def loss_result(
    outcome: LossOutcome, payloads: Payloads, outputs: Iterable[pb.GradientOutput] = ()
) -> pb.LossResult:
    """Returns the message of one evaluation.

    Args:
        outcome: What the engine found.
        payloads: Where large tensors go.
        outputs: Where gradients were written, which are not sent then.
    """
    places = {output.input: output.slices for output in outputs}
    result = pb.LossResult(
        loss=pack(outcome.loss, payloads),
        components=[
            pb.LossComponent(name=name, value=value, weight=weight)
            for name, value, weight in outcome.components
        ],
        positive_count=outcome.positive_count,
        raw_sums=[
            pb.RawSums(**{name: int(v) if name in _COUNTS else v for name, v in level.items()})  # type: ignore[arg-type]
            for level in outcome.raw_sums
        ],
        gradients=[_gradient(name, outcome, payloads, places.get(name)) for name in outcome.gradients],
        kept_rows=None if outcome.kept_rows is None else pack(outcome.kept_rows, payloads),
        non_finite=[
            pb.NonFinite(input=found.input, count=found.count, first_index=found.first_index)
            for found in outcome.non_finite
        ],
        negative_side_count=outcome.negative_side_count,
    )
    if outcome.preset is not None:
        result.preset = number_of(LOSS_PRESETS, outcome.preset)
    return result


def _gradient(
    name: str, outcome: LossOutcome, payloads: Payloads, places: Iterable[tensor_pb2.SharedSlice] | None
) -> pb.Gradient:
    arrays, rows = outcome.gradients[name], outcome.nonzero_rows.get(name)
    if places is not None:
        return pb.Gradient(input=name, tensors=map(pack_shared, arrays, places))
    if rows is not None and is_smaller(arrays, rows):
        sparse = [pack_sparse(*level, payloads) for level in zip(arrays, rows, strict=True)]
        return pb.Gradient(input=name, sparse=sparse)
    return pb.Gradient(input=name, tensors=[pack(array, payloads) for array in arrays])


def target_result(
    assignment: Assignment, target_format: int, preset: AssignerPreset, payloads: Payloads
) -> pb.TargetResult:
    """Returns the message of one item's targets, in the form asked for; large ones go to the payloads."""
    sparse = target_format == pb.TARGET_FORMAT_SPARSE
    if target_format == pb.TARGET_FORMAT_SMALLER:
        sparse = assignment.is_smaller_sparse()
    return pb.TargetResult(
        dense=None if sparse else _dense(assignment.dense(), payloads),
        sparse=_sparse(assignment.sparse(), payloads) if sparse else None,
        positive_counts=assignment.positive_counts(),
        feature_sizes=_sizes(assignment.pyramid),
        preset=number_of(ASSIGNER_PRESETS, preset),
    )


@lru_cache(maxsize=256)
def _sizes(pyramid: Pyramid) -> list[pb.Size]:
    """Returns the level sizes of a pyramid, to be copied into messages; there are few pyramids."""
    return [pb.Size(height=height, width=width) for height, width in pyramid.sizes]


def _dense(levels: list[DenseLevel], payloads: Payloads) -> pb.DenseTargets:
    return pb.DenseTargets(
        levels=[
            pb.DenseLevel(
                cls=pack(level.cls, payloads),
                reg=pack(level.reg, payloads),
                centerness=pack(level.centerness, payloads),
                ignored=None if level.ignored is None else pack(level.ignored, payloads),
            )
            for level in levels
        ]
    )


def _sparse(targets: SparseTargets, payloads: Payloads) -> pb.SparseTargets:
    return pb.SparseTargets(
        locations=pack(targets.locations, payloads),
        labels=pack(targets.labels, payloads),
        ltrb=pack(targets.ltrb, payloads),
        centerness=pack(targets.centerness, payloads),
        matched=pack(targets.matched, payloads),
        ignored=pack(targets.ignored, payloads),
    )
