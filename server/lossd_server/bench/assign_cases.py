"""The cases of the assigner: every location against every box, and lossd."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor

from lossd_server.bench import inputs, reference
from lossd_server.bench.case import Case, CaseSpec, Outcome, Path, Workbench
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.scenes import read_scenes
from lossd_server.targets import DEFAULT_STRIDES, FCOSAssigner, feature_sizes

_IMAGE = (800, 1333)
_SIZES = feature_sizes(_IMAGE, DEFAULT_STRIDES)
_BATCHES = ((1, 1), (1, 20), (1, 200), (8, 20), (1, 10_000))
"""Images, and boxes an image."""
_COCO = (8, 20)
"""The same, from an annotation file."""

# A pair of location and box on the largest level costs about 14 float32 in the all-pairs form.
_BYTES_PER_PAIR = 56


def assign_cases() -> list[CaseSpec]:
    """Returns the cases of the assigner, small ones first."""
    made_up = [
        CaseSpec(
            name=f"assign-{boxes}" if images == 1 else f"assign-{images}x{boxes}",
            title=f"target assignment, {_IMAGE[0]}x{_IMAGE[1]}, images: {images}, boxes an image: {boxes}",
            build=partial(_made_up, images=images, boxes=boxes),
            large=boxes > 1000,
        )
        for images, boxes in _BATCHES
    ]
    images, boxes = _COCO
    real = CaseSpec(
        name="assign-coco",
        title=f"target assignment, real objects, images: {images}, boxes an image: {boxes} at most",
        build=_real,
        needs_coco=True,
    )
    return [*made_up, real]


def _made_up(bench: Workbench, *, images: int, boxes: int) -> Case:
    return _case(bench, [inputs.boxes_and_labels(boxes, _IMAGE, seed=20 + i) for i in range(images)])


def _real(bench: Workbench) -> Case:
    images, boxes = _COCO
    try:
        scenes = read_scenes(bench.coco or FilePath(), images, _IMAGE, crowded=True)
    except (ValueError, OSError) as error:
        raise InvalidInputError(Reason.INVALID_OPTION, str(error), field="coco") from error
    objects = [(scene["boxes"][:boxes], scene["labels"][:boxes]) for scene in scenes]
    return _case(bench, [(torch.from_numpy(b), torch.from_numpy(c)) for b, c in objects])


def _case(bench: Workbench, objects: Sequence[tuple[Tensor, Tensor]]) -> Case:
    """Returns the paths to the targets of images with these boxes and labels."""
    boxes = max(len(labels) for _, labels in objects)
    on_device = [(b.to(bench.device), c.to(bench.device)) for b, c in objects]
    assigner = FCOSAssigner()
    ground_truth = [{"boxes": b.numpy(), "labels": c.numpy()} for b, c in objects]

    def all_pairs() -> Outcome:
        batch_boxes, batch_labels = map(list, zip(*on_device, strict=True))
        return _flat(reference.assign_batch(batch_boxes, batch_labels, _SIZES))

    def dense() -> Outcome:
        levels = assigner.assign(ground_truth, _SIZES).dense()
        return _flat([_as_tensors(level.cls, level.reg, level.centerness) for level in levels])

    def sparse() -> None:
        assigner.assign(ground_truth, _SIZES).sparse()

    height, width = _SIZES[0]
    return Case(
        paths=(
            Path(name="all-pairs", call=all_pairs, needs_bytes=height * width * boxes * _BYTES_PER_PAIR),
            Path(name="lossd", call=dense),
            Path(name="sparse", call=sparse),
        ),
        base="all-pairs",
    )


def _as_tensors(*arrays: np.ndarray) -> reference.DenseTargets:
    return reference.DenseTargets(*map(torch.from_numpy, arrays))


def _flat(levels: list[reference.DenseTargets]) -> list[Tensor]:
    """Returns the classes of all locations, then the other targets level by level."""
    classes = torch.cat([level.cls.flatten() for level in levels])
    return [classes, *(part for level in levels for part in (level.reg, level.centerness))]
