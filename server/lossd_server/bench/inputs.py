"""Inputs of the benchmark: the same numbers in every run, in no file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lossd_server.bench.reference import Predictions
from lossd_server.targets import DEFAULT_STRIDES

CLASSES = 80
SHAPES = {"S": (1, CLASSES, 13, 13), "M": (2, CLASSES, 100, 100), "L": (16, CLASSES, 100, 100)}
"""Logits of three sizes: 54 kB, 6.4 MB and 51.2 MB."""
SHAPES_FOR_GPUS = {"XL": (64, CLASSES, 100, 100)}
"""Of 205 MB."""

# Objects of COCO are about 80 px wide in the median once an image is resized to 800 × 1333, and
# spread over two orders of magnitude.
_MEDIAN_SIDE, _SPREAD_OF_SIDE, _SPREAD_OF_ASPECT = 80.0, 1.0, 0.4


def generator(seed: int) -> torch.Generator:
    """Returns a source of random numbers on the host."""
    return torch.Generator().manual_seed(seed)


def logits_and_labels(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns logits `[B, C, H, W]`, mostly negative as those of a head, and labels, a few of them -1."""
    source = generator(1)
    batch, classes, height, width = shape
    logits = torch.randn(*shape, generator=source) * 2 - 2
    return logits, torch.randint(-1, classes, (batch, height, width), generator=source)


def box_pairs(count: int) -> tuple[Tensor, Tensor]:
    """Returns predicted boxes `[N, 4]` and target boxes near them; some do not overlap."""
    source = generator(2)
    target, _ = boxes_and_labels(count, (800, 1333), seed=3)
    side = (target[:, 2:] - target[:, :2]).repeat(1, 2)
    pred = target + torch.randn(count, 4, generator=source) * side * 0.2
    top_left, bottom_right = torch.min(pred[:, :2], pred[:, 2:]), torch.max(pred[:, :2], pred[:, 2:])
    return torch.cat([top_left, bottom_right], dim=1), target


def centerness_pairs(count: int) -> tuple[Tensor, Tensor]:
    """Returns centerness logits `[N]` and targets in 0..1."""
    source = generator(4)
    return torch.randn(count, generator=source) * 2, torch.rand(count, generator=source)


def boxes_and_labels(count: int, image_size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Returns boxes `[N, 4]` xyxy in the sizes of COCO's objects, inside the image, and their labels."""
    source = generator(seed)
    height, width = image_size
    side = _MEDIAN_SIDE * torch.exp(torch.randn(count, generator=source) * _SPREAD_OF_SIDE)
    aspect = torch.exp(torch.randn(count, generator=source) * _SPREAD_OF_ASPECT)
    extent = torch.stack([side * aspect, side / aspect], dim=1)
    limit = torch.tensor([width, height], dtype=torch.float32)
    extent = extent.clamp(min=4).minimum(limit)
    top_left = torch.rand(count, 2, generator=source) * (limit - extent)
    labels = torch.randint(0, CLASSES, (count,), generator=source)
    return torch.cat([top_left, top_left + extent], dim=1), labels


def head_outputs(batch: int, sizes: Sequence[tuple[int, int]]) -> Predictions:
    """Returns what an FCOS head puts out, on levels of these sizes: a few strides to each side."""
    source = generator(5)
    return Predictions(
        cls=[torch.randn(batch, CLASSES, *size, generator=source) * 2 - 4 for size in sizes],
        reg=[
            (1 + torch.randn(batch, 4, *size, generator=source).abs() * 4) * stride
            for size, stride in zip(sizes, DEFAULT_STRIDES, strict=True)
        ],
        centerness=[torch.randn(batch, 1, *size, generator=source) for size in sizes],
    )
