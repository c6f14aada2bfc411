"""What the engine is asked, and what it answers: numpy, or what lies on its GPU; nothing of a transport."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from lossd.gpu_memory import GpuArray
from lossd_server.losses import Evaluation, EvaluationOptions, LossOutcome
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
