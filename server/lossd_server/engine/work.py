"""What the engine is asked, and what it answers: numpy on the host, nothing of any transport."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lossd_server.losses import Evaluation, EvaluationOptions, LossPreset, NonFinite
from lossd_server.losses.module import Arguments
from lossd_server.targets import Assignment, FCOSAssigner
from lossd_server.targets.ground_truth import Objects
from lossd_server.targets.pyramid import Pyramid

Array = NDArray[Any]

_IMAGE_COST = 100


class Evaluable(Protocol):
    """A loss that the engine can evaluate: one of ours, or the operator's."""

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared arguments whose tensors lie on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossItem:
    """One evaluation.

    Attributes:
        path: Where the item stands in the request, for errors, e.g. `items[3].focal`.
        arguments: Prepared arguments, as numpy arrays and lists of them.
        options: What is wanted beside the value.
        outputs: Arrays that gradients are written to, by input name, one or one a level; a gradient
            without an entry gets an array of its own.
    """

    path: str
    arguments: Arguments
    options: EvaluationOptions
    outputs: Mapping[str, list[Array]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossJob:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutcome:
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
    components: list[tuple[str, float, float]] = field(default_factory=list)
    gradients: dict[str, list[Array]] = field(default_factory=dict)
    raw_sums: list[Mapping[str, float]] = field(default_factory=list)
    non_finite: list[NonFinite] = field(default_factory=list)
    preset: LossPreset | None = None
    kept_rows: Array | None = None
    negative_side_count: int = 0
    nonzero_rows: Mapping[str, Sequence[NDArray[np.int64]]] = field(default_factory=dict)

    @property
    def positive_count(self) -> int:
        """Rows or locations that carry an object, over all levels."""
        return int(sum(level["positive_count"] for level in self.raw_sums))


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignItem:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignJob:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds that a job waited for the device, and that it ran."""

    queue: float
    compute: float


LossResults = tuple[list[LossOutcome], Timing]
AssignResults = tuple[list[Assignment], Timing]
