"""What the engine is asked, and what it answers: numpy, or what lies on its GPU; nothing of a transport."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lossd.gpu_memory import GpuArray
from lossd_server.losses import Evaluation, EvaluationOptions, LossPreset, NonFinite
from lossd_server.losses.module import Arguments
from lossd_server.targets import Assignment, FCOSAssigner
from lossd_server.targets.ground_truth import Objects
from lossd_server.targets.pyramid import Pyramid

Array = NDArray[Any]
AnyArray = Array | GpuArray
"""An array of the host's memory, or of a GPU's."""

_IMAGE_COST = 100

_NOTHING: Mapping[str, Any] = {}


class Evaluable(Protocol):
    """A loss that the engine can evaluate: one of ours, or the operator's."""

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared arguments whose tensors lie on the device."""


class LossItem(NamedTuple):
    """One evaluation.

    Attributes:
        path: Where the item stands in the request, for errors, e.g. `items[3].focal`.
        arguments: Prepared arguments, as arrays and lists of them.
        options: What is wanted beside the value.
        outputs: Arrays that gradients are written to, by input name, one or one a level; a gradient
            without an entry gets an array of its own.
    """

    path: str
    arguments: Arguments
    options: EvaluationOptions
    outputs: Mapping[str, list[AnyArray]] = _NOTHING


class LossJob(NamedTuple):
    """A batch of evaluations under one loss.

    Attributes:
        loss: The loss.
        items: The evaluations.
        strict: Whether NaN and infinity in the inputs are refused.
        owner: Whose memory it reads and writes in place, if anyone's: jobs of one owner are done in the
            order in which they come, whoever brings them.
    """

    loss: Evaluable
    items: list[LossItem]
    strict: bool = False
    owner: Hashable = None


class LossOutcome(NamedTuple):
    """An `Evaluation` on the host.

    Attributes:
        loss: 0-d, or one number a row.
        components: Name, value and weight of each term.
        gradients: By input name, one array or one a level.
        raw_sums: One mapping a level.
        non_finite: Inputs that hold NaN or infinity.
        preset: Whose numbers these are; None for a custom loss.
        kept_rows: Which flattened target positions `loss` is of, where some are left out.
        negative_side_count: Positives whose predicted distances have a negative side.
        nonzero_rows: Outside which places along `[B, H, W]` a gradient is exactly zero, as in `Evaluation`.
    """

    loss: Array
    components: Sequence[tuple[str, float, float]] = ()
    gradients: Mapping[str, Sequence[AnyArray]] = _NOTHING
    raw_sums: Sequence[Mapping[str, float]] = ()
    non_finite: Sequence[NonFinite] = ()
    preset: LossPreset | None = None
    kept_rows: Array | None = None
    negative_side_count: int = 0
    nonzero_rows: Mapping[str, Sequence[NDArray[np.int64]]] = _NOTHING

    @property
    def positive_count(self) -> int:
        """Rows or locations that carry an object, over all levels."""
        return int(sum(level["positive_count"] for level in self.raw_sums))


class AssignItem(NamedTuple):
    """Images of one size: their objects, and the levels of their pyramid."""

    path: str
    objects: list[Objects]
    levels: Pyramid

    @property
    def cost(self) -> int:
        """What it takes beside other items: an image is about as much as a hundred boxes."""
        return 1 + sum(_IMAGE_COST + len(image.labels) for image in self.objects)

    @property
    def location_count(self) -> int:
        """Number of locations of all images."""
        return len(self.objects) * self.levels.location_count


class AssignJob(NamedTuple):
    """A batch of assignments under one assigner.

    Attributes:
        assigner: The rules.
        items: The images.
        max_positives: It is refused where more locations are positive.
        answer_bytes: What the answer comes to whatever is positive.
    """

    assigner: FCOSAssigner
    items: list[AssignItem]
    max_positives: int
    answer_bytes: int = 0


class Timing(NamedTuple):
    """Seconds that a job waited for the device, and that it ran."""

    queue: float
    compute: float


LossResults = tuple[list[LossOutcome], Timing]
AssignResults = tuple[list[Assignment], Timing]
