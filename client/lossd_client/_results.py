"""What both clients hand out: reads answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Parcel, Payloads
from lossd_client._arrays import Array
from lossd_client._gradients import GradientArrays
from lossd_client._storage import Storage

TOTAL_NAMES = ("loss", "total_loss")
COMPONENT_SUMS = ("cls_loss", "reg_loss", "centerness_loss", "centerness_target", "weight")
COUNTS = ("valid_count", "positive_count")


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """An input that holds NaN or infinity: which, how many, and where the first one lies."""

    input: str
    count: int
    first_index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossResult:
    """The outcome of one evaluation. Its arrays are read-only: views of the answer as it came.

    Gradients may lie in memory that is shared with the server. It is used again when nothing refers to
    an array of it any more, and not before: a result, or an array taken out of it, may be kept for good.

    Attributes:
        loss: 0-d, or `[rows]` under the reduction `none`; float64 for float64 inputs, else float32.
        components: The terms of the loss by name, and for an FCOS loss the weighted total as `loss`
            and as `total_loss`.
        component_weights: The share of each term in the loss; 0 for one that is only reported.
        gradients: By input name: an array in the shape and dtype of the input, for an FCOS loss one
            for each level.
        positive_count: Rows or locations that carry an object.
        raw_sums: Sums before weights and division, over all levels: add them up over workers.
        level_sums: The same for each level.
        preset: Whose numbers these are; None for a custom loss.
        kept_rows: Which flattened target positions `loss` is of, where some are left out.
        non_finite: Inputs that hold NaN or infinity.
        negative_side_count: Positives whose predicted distances have a negative side.
        timings: Seconds that the server spent in each stage of the whole call.
    """

    loss: Array
    components: Mapping[str, float]
    component_weights: Mapping[str, float]
    gradients: GradientArrays
    positive_count: int
    raw_sums: Mapping[str, float]
    level_sums: tuple[Mapping[str, float], ...]
    preset: str | None
    kept_rows: Array | None
    non_finite: tuple[NonFinite, ...]
    negative_side_count: int
    timings: Mapping[str, float]

    def release(self) -> None:
        """Lets go of the gradients, so that their memory is used again although the result is kept.

        To ask the result for a gradient from then on is a `RuntimeError`. An array that was taken out
        before stays what it is.
        """
        self.gradients.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLevel:
    """Targets of one level: `cls` and `centerness` `[B, H, W]`, `reg` `[B, 4, H, W]`.

    `ignored` `[B, H, W]` marks locations in crowd regions; None when there are none.
    """

    cls: Array
    reg: Array
    centerness: Array
    ignored: Array | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTargets:
    """Targets of every location, level by level.

    Attributes:
        levels: In the order of the strides.
        positive_counts: Positive locations of each level.
        feature_sizes: Height and width of each level.
        preset: Whose rules these are.
        timings: Seconds that the server spent in each stage.
    """

    levels: tuple[DenseLevel, ...]
    positive_counts: tuple[int, ...]
    feature_sizes: tuple[tuple[int, int], ...]
    preset: str
    timings: Mapping[str, float]

    @property
    def cls(self) -> tuple[Array, ...]:
        """Classes, one array a level: the `cls_targets` of an FCOS loss."""
        return tuple(level.cls for level in self.levels)

    @property
    def reg(self) -> tuple[Array, ...]:
        """Distances, one array a level: the `reg_targets` of an FCOS loss."""
        return tuple(level.reg for level in self.levels)

    @property
    def centerness(self) -> tuple[Array, ...]:
        """Centerness, one array a level: the `centerness_targets` of an FCOS loss."""
        return tuple(level.centerness for level in self.levels)

    @property
    def ignored(self) -> tuple[Array, ...]:
        """What lies in crowd regions, one array a level: the `ignored_targets`; empty without any."""
        return tuple(level.ignored for level in self.levels if level.ignored is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """Targets of the positive locations, ordered by image, level, row, column.

    Attributes:
        locations: Image, level, row and column of each, `[P, 4]` int32.
        labels: `[P]` int64.
        ltrb: Distances in pixels, `[P, 4]` float32.
        centerness: `[P]` float32.
        matched: Index of each one's box among the boxes of its image, `[P]` int32.
        ignored: Image, level, row and column of each location in a crowd region, `[Q, 4]` int32.
        positive_counts: Positive locations of each level.
        feature_sizes: Height and width of each level.
        preset: Whose rules these are.
        timings: Seconds that the server spent in each stage.
    """

    locations: Array
    labels: Array
    ltrb: Array
    centerness: Array
    matched: Array
    ignored: Array
    positive_counts: tuple[int, ...]
    feature_sizes: tuple[tuple[int, int], ...]
    preset: str
    timings: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """What a server is and offers.

    Attributes:
        version: Version of lossd.
        devices: Devices that evaluate.
        losses: Kinds of losses.
        custom_losses: Names of the inputs of each custom loss, by its name.
        loss_presets: Presets of the FCOS loss.
        assigner_presets: Presets of the assigner.
        max_message_bytes: Largest request that it reads.
        max_stream_count: Most streams that it serves at a time.
        uptime_seconds: Since it started.
        shared_memory_socket: Path of the socket that takes shared memory; empty where none is shared.
        max_shared_bytes: Most shared memory of one connection.
    """

    version: str
    devices: tuple[str, ...]
    losses: tuple[str, ...]
    custom_losses: Mapping[str, tuple[str, ...]]
    loss_presets: tuple[str, ...]
    assigner_presets: tuple[str, ...]
    max_message_bytes: int
    max_stream_count: int
    uptime_seconds: float
    shared_memory_socket: str
    max_shared_bytes: int


def read_loss_results(
    kind: str, storage: Storage, answer: Parcel[pb.ComputeLossResponse]
) -> list[LossResult]:
    """Returns the results of all items of a request, in order; gradients may lie in its storage."""
    timings = _timings(answer.message.timings)
    return [
        _read_loss_result(kind, result, timings, answer.payloads, storage)
        for result in answer.message.results
    ]


def read_targets(answer: Parcel[pb.AssignTargetsResponse]) -> DenseTargets | SparseTargets:
    """Returns the targets of the one item of a request."""
    response, payloads = answer.message, answer.payloads
    (result,) = response.results
    about: dict[str, Any] = {
        "positive_counts": tuple(result.positive_counts),
        "feature_sizes": tuple((size.height, size.width) for size in result.feature_sizes),
        "preset": _preset(losses_pb2.AssignerPreset, result.preset),
        "timings": _timings(response.timings),
    }
    if result.WhichOneof("targets") == "sparse":
        sparse = result.sparse
        return SparseTargets(
            locations=unpack(sparse.locations, payloads),
            labels=unpack(sparse.labels, payloads),
            ltrb=unpack(sparse.ltrb, payloads),
            centerness=unpack(sparse.centerness, payloads),
            matched=unpack(sparse.matched, payloads),
            ignored=unpack(sparse.ignored, payloads),
            **about,
        )
    levels = tuple(
        DenseLevel(
            cls=unpack(level.cls, payloads),
            reg=unpack(level.reg, payloads),
            centerness=unpack(level.centerness, payloads),
            ignored=_optional(level, "ignored", payloads),
        )
        for level in result.dense.levels
    )
    return DenseTargets(levels=levels, **about)


def read_server_info(answer: Parcel[pb.GetServerInfoResponse]) -> ServerInfo:
    """Returns what a server says of itself."""
    response = answer.message
    return ServerInfo(
        version=response.version,
        devices=tuple(response.devices),
        losses=tuple(response.losses),
        custom_losses={loss.name: tuple(loss.inputs) for loss in response.custom_losses},
        loss_presets=tuple(_preset(losses_pb2.LossPreset, p) for p in response.loss_presets),
        assigner_presets=tuple(_preset(losses_pb2.AssignerPreset, p) for p in response.assigner_presets),
        max_message_bytes=response.max_message_bytes,
        max_stream_count=response.max_stream_count,
        uptime_seconds=response.uptime_seconds,
        shared_memory_socket=response.shared_memory_socket,
        max_shared_bytes=response.max_shared_bytes,
    )


def _read_loss_result(
    kind: str, result: pb.LossResult, timings: Mapping[str, float], payloads: Payloads, storage: Storage
) -> LossResult:
    loss = unpack(result.loss, payloads)
    components = {component.name: component.value for component in result.components}
    if kind == "fcos":
        components.update(dict.fromkeys(TOTAL_NAMES, float(loss)))
    level_sums = tuple(_sums(level) for level in result.raw_sums)
    return LossResult(
        loss=loss,
        components=components,
        component_weights={component.name: component.weight for component in result.components},
        gradients=GradientArrays(
            {g.input: _read_gradient(kind, g, payloads, storage) for g in result.gradients}
        ),
        positive_count=result.positive_count,
        raw_sums={name: sum(level[name] for level in level_sums) for name in (*COMPONENT_SUMS, *COUNTS)},
        level_sums=level_sums,
        preset=_preset(losses_pb2.LossPreset, result.preset) if result.preset else None,
        kept_rows=_optional(result, "kept_rows", payloads),
        non_finite=tuple(
            NonFinite(input=found.input, count=found.count, first_index=tuple(found.first_index))
            for found in result.non_finite
        ),
        negative_side_count=result.negative_side_count,
        timings=timings,
    )


def _read_gradient(kind: str, gradient: pb.Gradient, payloads: Payloads, storage: Storage) -> Any:
    tensors = [storage.read(tensor, payloads) for tensor in gradient.tensors]
    return tensors if kind == "fcos" else tensors[0]


def _sums(level: pb.RawSums) -> dict[str, float]:
    return {name: getattr(level, name) for name in (*COMPONENT_SUMS, *COUNTS)}


def _optional(message: Any, field: str, payloads: Payloads) -> Array | None:
    tensor: tensor_pb2.Tensor = getattr(message, field)
    return unpack(tensor, payloads) if message.HasField(field) else None


def _timings(timings: pb.StageTimings) -> dict[str, float]:
    return {
        field.name.removesuffix("_us"): getattr(timings, field.name) / 1e6
        for field in timings.DESCRIPTOR.fields
    }


def _preset(wire: Any, number: int) -> str:
    """Returns our name for a preset, or its number when this client does not know it."""
    if number not in wire.values():
        return str(number)
    return str(wire.Name(number)).removeprefix("LOSS_PRESET_").removeprefix("ASSIGNER_PRESET_").lower()
