"""Scenes for the demo and the benchmark: made up with COCO's size statistics, or read from a COCO file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

Scene = dict[str, Any]
"""`boxes` `[N, 4]` xyxy pixels, `labels` `[N]`, `iscrowd` `[N]`: one image's ground truth."""

NUM_CLASSES = 80


def make_scenes(count: int, image_size: tuple[int, int], seed: int = 0) -> list[Scene]:
    """Returns scenes whose objects are as many, as large and as long as those of COCO.

    Log-normal fits to COCO's validation annotations: objects an image (median 5), square root of the
    box's share of the image (median 0.1), width over height (median 0.85).
    """
    rng = np.random.default_rng(seed)
    return [_make_scene(rng, *image_size) for _ in range(count)]


def read_scenes(path: Path, count: int, image_size: tuple[int, int], *, crowded: bool = False) -> list[Scene]:
    """Returns images with objects of a COCO annotation file, scaled to fit the size.

    Args:
        path: The file.
        count: How many.
        image_size: Height and width, pixels.
        crowded: Whether to take those with the most objects, and not the first.

    Raises:
        ValueError: The file holds no such annotations.
    """
    try:
        data = json.loads(path.read_text())
        classes = {category["id"]: index for index, category in enumerate(data["categories"])}
        scenes = [_read_scene(data["annotations"], image, classes, image_size) for image in data["images"]]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no COCO annotations: {error!r}") from error
    scenes = [scene for scene in scenes if len(scene["labels"])]
    if crowded:
        scenes.sort(key=lambda scene: -len(scene["labels"]))
    scenes = scenes[:count]
    if len(scenes) < count:
        raise ValueError(f"{path} has {len(scenes)} images with objects, want {count}")
    return scenes


def _make_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    count = int(np.clip(rng.lognormal(1.67, 0.98), 3, 60))
    share = np.clip(rng.lognormal(-2.31, 1.05, count), 0.02, 0.9)
    aspect = np.exp(rng.normal(-0.16, 0.77, count) / 2)
    extent = share[:, None] * np.sqrt(height * width) * np.stack([aspect, 1 / aspect], axis=1)
    extent = np.minimum(extent, [width, height])
    corner = rng.uniform(size=(count, 2)) * ([width, height] - extent)
    boxes = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
    labels = np.minimum(rng.zipf(1.5, count) - 1, NUM_CLASSES - 1)  # a few classes are most objects
    return {"boxes": boxes, "labels": labels, "iscrowd": np.zeros(count, np.bool_)}


def _read_scene(
    annotations: list[dict[str, Any]],
    image: dict[str, Any],
    classes: dict[int, int],
    image_size: tuple[int, int],
) -> Scene:
    own = [annotation for annotation in annotations if annotation["image_id"] == image["id"]]
    scale = min(image_size[0] / image["height"], image_size[1] / image["width"])
    xywh = np.array([annotation["bbox"] for annotation in own], np.float64).reshape(-1, 4) * scale
    return {
        "boxes": np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32),
        "labels": np.array([classes[annotation["category_id"]] for annotation in own], np.int64),
        "iscrowd": np.array([annotation["iscrowd"] for annotation in own], np.bool_),
    }
