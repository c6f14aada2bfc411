"""What both clients hand out of losses and servers: reads answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from lossd.tensors import TensorError, unpack
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

_TENSORS: tuple[Literal["loss", "gradients", "kept_rows"], ...] = ("loss", "gradients", "kept_rows")
"""The fields of a result that hold some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """An input that holds NaN or infinity: which, how many, and where the first one lies."""

    input: str
    count: int
    first_index: tuple[int, ...]


class LossResult:
    """The outcome of one evaluation. Its arrays are read-only: views of the answer as it came.

    Gradients may lie in memory that is shared with the server, and those of predictions on its GPU lie there
    too, as `GpuArray`. It is used again when nothing refers to an array of it any more, and not before: a
    result, or an array taken out of it, may be kept for good.

    The numbers beside the loss and its gradients are read when they are asked for.

    Args:
        loss: The loss.
        gradients: The gradients by input name.
        kept_rows: Which target positions the loss is of, where some are left out.
        about: The rest of the result's message, with no tensor in it.
        rest: The rest of the answer's message, with no result in it.
        total_names: Under which names the loss is one of the components too.
    """

    __slots__ = ("_about", "_gradients", "_kept_rows", "_loss", "_rest", "_total_names")

    def __init__(
        self,
        loss: Array,
        gradients: GradientArrays,
        kept_rows: Array | None,
        about: pb.LossResult,
        rest: pb.ComputeLossResponse,
        total_names: Sequence[str] = (),
    ) -> None:
        self._loss = loss
        self._gradients = gradients
        self._kept_rows = kept_rows
        self._about = about
        self._rest = rest
        self._total_names = total_names

    @property
    def loss(self) -> Array:
        """0-d, or `[rows]` under the reduction `none`; float64 for float64 inputs, else float32."""
        return self._loss

    @property
    def components(self) -> Mapping[str, float]:
        """The terms of the loss by name; an FCOS loss has its total too, as `loss` and `total_loss`."""
        found = {component.name: component.value for component in self._about.components}
        return found | {name: float(self._loss) for name in self._total_names}

    @property
    def component_weights(self) -> Mapping[str, float]:
        """The share of each term in the loss; 0 for one that is only reported."""
        return {component.name: component.weight for component in self._about.components}

    @property
    def gradients(self) -> GradientArrays:
        """By input name: an array in the shape and dtype of the input, of an FCOS loss one for each level."""
        return self._gradients

    @property
    def positive_count(self) -> int:
        """Rows or locations that carry an object."""
        return self._about.positive_count

    @property
    def raw_sums(self) -> Mapping[str, float]:
        """Sums before weights and division, over all levels: add them up over workers."""
        levels = self.level_sums
        if len(levels) == 1:
            return levels[0]
        return {name: sum(level[name] for level in levels) for name in _SUMS}

    @property
    def level_sums(self) -> tuple[Mapping[str, float], ...]:
        """The same for each level."""
        return tuple(dict(zip(_SUMS, _read_sums(level), strict=True)) for level in self._about.raw_sums)

    @property
    def preset(self) -> str | None:
        """Whose numbers these are; None for a custom loss."""
        return preset_name(losses_pb2.LossPreset, self._about.preset) if self._about.preset else None

    @property
    def kept_rows(self) -> Array | None:
        """Which flattened target positions `loss` is of, where some are left out."""
        return self._kept_rows

    @property
    def non_finite(self) -> tuple[NonFinite, ...]:
        """Inputs that hold NaN or infinity."""
        return tuple(
            NonFinite(input=found.input, count=found.count, first_index=tuple(found.first_index))
            for found in self._about.non_finite
        )

    @property
    def negative_side_count(self) -> int:
        """Positives whose predicted distances have a negative side."""
        return self._about.negative_side_count

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds that the server spent in each stage of the whole call."""
        return timings_of(self._rest.timings)

    def __reduce__(self) -> tuple[Any, ...]:
        held = self._loss, self._gradients, self._kept_rows, self._about, self._rest, self._total_names
        return type(self), held

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _PROPERTIES)
        return f"LossResult({shown})"

    def release(self) -> None:
        """Lets go of the gradients, so that their memory is used again although the result is kept.

        To ask the result for a gradient from then on is a `RuntimeError`. An array that was taken out
        before stays what it is.
        """
        self._gradients.release()


_PROPERTIES = [name for name, member in vars(LossResult).items() if isinstance(member, property)]


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
        answer: The answer, which loses its tensors.

    Raises:
        TensorError: A tensor means no array, or a gradient is not that of its input.
        ServerError: A gradient lies where this call has no memory.
    """
    rest = pb.ComputeLossResponse(timings=answer.message.timings)
    return [
        _read_loss_result(f"items[{index}].{kind}", result, rest, answer.payloads, storage)
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
    path: str, result: pb.LossResult, rest: pb.ComputeLossResponse, payloads: Payloads, storage: Storage
) -> LossResult:
    loss = storage.form.loss(path, unpack(result.loss, payloads))
    gradients = {g.input: read_gradient(f"{path}.{g.input}", g, payloads, storage) for g in result.gradients}
    kept_rows = optional_array(result, "kept_rows", payloads)
    total_names = TOTAL_NAMES if path.endswith("fcos") else ()
    if total_names and loss.shape:
        raise TensorError("INVALID_SHAPE", f"the loss of {path} has shape {list(loss.shape)}, want []")
    for tensors in _TENSORS:
        result.ClearField(tensors)
    about = pb.LossResult()
    about.CopyFrom(result)  # or the result would keep all the memory of the answer
    return LossResult(loss, GradientArrays(gradients), kept_rows, about, rest, total_names)
