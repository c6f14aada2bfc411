"""What both clients hand out of losses and servers: reads answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.wire import Parcel, Payloads
from lossd_client._arrays import Array
from lossd_client._gradients import GradientArrays, read_gradient
from lossd_client._reading import optional_array, preset_name, timings_of
from lossd_client._storage import Storage

TOTAL_NAMES = ("loss", "total_loss")
COMPONENT_SUMS = ("cls_loss", "reg_loss", "centerness_loss", "centerness_target", "weight")
COUNTS = ("valid_count", "positive_count")
_SUMS = (*COMPONENT_SUMS, *COUNTS)
_read_sums = attrgetter(*_SUMS)


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """An input that holds NaN or infinity: which, how many, and where the first one lies."""

    input: str
    count: int
    first_index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossResult:
    """The outcome of one evaluation. Its arrays are read-only: views of the answer as it came.

    Gradients may lie in memory that is shared with the server, and those of predictions on its GPU lie there
    too, as `GpuArray`. It is used again when nothing refers to an array of it any more, and not before: a
    result, or an array taken out of it, may be kept for good.

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
        shared_gpu: UUID of the GPU whose memory can be shared too; empty for none.
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
    shared_gpu: str


def read_loss_results(
    kind: str, storage: Storage, first_item: int, answer: Parcel[pb.ComputeLossResponse]
) -> list[LossResult]:
    """Returns the results of the items of a request, in order.

    Args:
        kind: Name of the loss in the contract's `oneof`.
        storage: What the request was packed into; gradients may lie there.
        first_item: Place of the request's first item among those that were packed.
        answer: The answer.

    Raises:
        TensorError: A tensor means no array, or a gradient is not that of its input.
        ServerError: A gradient lies where this call has no memory.
    """
    timings = timings_of(answer.message.timings)
    return [
        _read_loss_result(f"items[{index}].{kind}", result, timings, answer.payloads, storage)
        for index, result in enumerate(answer.message.results, first_item)
    ]


def read_server_info(answer: Parcel[pb.GetServerInfoResponse]) -> ServerInfo:
    """Returns what a server says of itself."""
    response = answer.message
    return ServerInfo(
        version=response.version,
        devices=tuple(response.devices),
        losses=tuple(response.losses),
        custom_losses={loss.name: tuple(loss.inputs) for loss in response.custom_losses},
        loss_presets=tuple(preset_name(losses_pb2.LossPreset, p) for p in response.loss_presets),
        assigner_presets=tuple(preset_name(losses_pb2.AssignerPreset, p) for p in response.assigner_presets),
        max_message_bytes=response.max_message_bytes,
        max_stream_count=response.max_stream_count,
        uptime_seconds=response.uptime_seconds,
        shared_memory_socket=response.shared_memory_socket,
        max_shared_bytes=response.max_shared_bytes,
        shared_gpu=response.shared_gpu,
    )


def _read_loss_result(
    path: str, result: pb.LossResult, timings: Mapping[str, float], payloads: Payloads, storage: Storage
) -> LossResult:
    loss = storage.form.loss(path, unpack(result.loss, payloads))
    components = {component.name: component.value for component in result.components}
    if path.endswith("fcos"):
        components.update(dict.fromkeys(TOTAL_NAMES, float(loss)))
    level_sums = tuple(map(_sums, result.raw_sums))
    return LossResult(
        loss=loss,
        components=components,
        component_weights={component.name: component.weight for component in result.components},
        gradients=GradientArrays(
            {g.input: read_gradient(f"{path}.{g.input}", g, payloads, storage) for g in result.gradients}
        ),
        positive_count=result.positive_count,
        raw_sums=level_sums[0] if len(level_sums) == 1 else _added(level_sums),
        level_sums=level_sums,
        preset=preset_name(losses_pb2.LossPreset, result.preset) if result.preset else None,
        kept_rows=optional_array(result, "kept_rows", payloads),
        non_finite=tuple(map(_non_finite, result.non_finite)),
        negative_side_count=result.negative_side_count,
        timings=timings,
    )


def _added(level_sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(level[name] for level in level_sums) for name in _SUMS}


def _sums(level: pb.RawSums) -> dict[str, float]:
    return dict(zip(_SUMS, _read_sums(level), strict=True))


def _non_finite(found: pb.NonFinite) -> NonFinite:
    return NonFinite(input=found.input, count=found.count, first_index=tuple(found.first_index))
