"""From requests to work: reads their tensors, checks everything, and names the field of whatever is wrong."""

from collections.abc import Mapping

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.engine import AssignItem, AssignJob, CustomLoss, LossItem, LossJob
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.losses.module import Arguments
from lossd_server.rpc.forms import Request
from lossd_server.rpc.outputs import read_outputs
from lossd_server.rpc.plans import plan_assignment, plan_loss
from lossd_server.rpc.sources import SourceReader
from lossd_server.shared_memory import Regions, Slices
from lossd_server.targets import BYTES_OF_POSITIVE

_DENSE_BYTES_PER_LOCATION = 8 + 16 + 4 + 1
_SPARSE_FORMATS = {pb.TARGET_FORMAT_SPARSE, pb.TARGET_FORMAT_SMALLER}
_SPARSE_BYTES_PER_LOCATION = 4
"""What a location costs before a box is looked at, where none is a crowd region."""


def read_loss_job(
    request: Request[pb.ComputeLossRequest],
    custom_losses: Mapping[str, CustomLoss],
    regions: Regions | None = None,
) -> LossJob:
    """Returns the checked work of a request.

    Args:
        request: The request.
        custom_losses: The operator's losses by name.
        regions: The shared memory that it may name; None where its caller can have passed none.

    Raises:
        InvalidInputError: Whatever is wrong with it, by field path.
    """
    plan = request.planned(plan_loss, custom_losses)
    slices = Slices(regions)
    predictions = plan.loss.inputs if isinstance(plan.loss, CustomLoss) else plan.loss.differentiable
    reader = SourceReader(request.payloads, slices, predictions)
    items = []
    for index, planned in enumerate(plan.items):
        with errors_within(planned.path):
            arguments: Arguments = {
                name: reader.arguments(source) for name, source in planned.sources.items()
            }
            if isinstance(plan.loss, CustomLoss):
                plan.loss.check(arguments, planned.options.gradients)
            else:
                if not request.is_checked:
                    plan.loss.check(arguments)
                arguments = plan.loss.read(arguments)
        item = LossItem(planned.path, arguments, planned.options)
        if planned.has_outputs:
            with errors_within(f"items[{index}]"):
                item = item._replace(outputs=read_outputs(request.message, index, item.arguments, slices))
        items.append(item)
    slices.check_overlaps()
    return LossJob(loss=plan.loss, items=items, strict=plan.strict, owner=slices.owner())


def read_assign_job(
    request: Request[pb.AssignTargetsRequest], max_answer_bytes: int, regions: Regions | None = None
) -> AssignJob:
    """Returns the checked work of a request whose answer stays within a size; see `read_loss_job`.

    Raises:
        InvalidInputError: Whatever is wrong with it, by field path.
    """
    plan, target_format = request.planned(plan_assignment), request.message.format
    reader = SourceReader(request.payloads, Slices(regions))
    items = []
    for planned in plan.items:
        with errors_within(planned.path):
            objects = plan.assigner.read(reader.arguments(planned.sources))
            items.append(AssignItem(path=planned.path, objects=objects, levels=planned.levels))
    locations = sum(item.location_count for item in items)
    _require_answer_size(items, locations, target_format, max_answer_bytes)
    return AssignJob(
        assigner=plan.assigner,
        items=items,
        max_positives=_most_positives(locations, target_format, max_answer_bytes),
        answer_bytes=0 if target_format in _SPARSE_FORMATS else locations * _DENSE_BYTES_PER_LOCATION,
    )


def _require_answer_size(items: list[AssignItem], locations: int, target_format: int, max_bytes: int) -> None:
    """Refuses a few bytes that ask for gigabytes."""
    if locations * _DENSE_BYTES_PER_LOCATION <= max_bytes:
        return
    crowded = any(image.iscrowd is not None for item in items for image in item.objects)
    sparse = target_format in _SPARSE_FORMATS and not crowded
    per_location = _SPARSE_BYTES_PER_LOCATION if sparse else _DENSE_BYTES_PER_LOCATION
    if locations * per_location > max_bytes:
        raise InvalidInputError(
            Reason.MESSAGE_TOO_LARGE,
            f"come to {locations} locations, at most {max_bytes // per_location} are answered in one call",
            field="items",
            value=locations,
            limit=max_bytes // per_location,
        )


def _most_positives(locations: int, target_format: int, max_bytes: int) -> int:
    """Returns how many positives the answer has room for."""
    sparse = max_bytes // BYTES_OF_POSITIVE
    dense_fits = locations * _DENSE_BYTES_PER_LOCATION <= max_bytes
    return max(locations, sparse) if dense_fits and target_format != pb.TARGET_FORMAT_SPARSE else sparse
