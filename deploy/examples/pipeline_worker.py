"""A worker of a data pipeline: has FCOS targets assigned to the images of its share of a COCO file.

Run by an Indexed Job, each pod takes every n-th image and writes one `.npz` an image, with the positive
locations of all levels. A worker that is started again skips what it finds done.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lossd_client import Client, FCOSAssigner, LossdError


def read_images(annotations: Path) -> list[dict[str, Any]]:
    """Returns id, size and objects of each image, in the order of their ids."""
    coco = json.loads(annotations.read_text())
    labels = {category["id"]: index for index, category in enumerate(coco["categories"])}
    objects = defaultdict(list)
    for found in coco["annotations"]:
        objects[found["image_id"]].append(found)
    return [
        {
            "id": image["id"],
            "size": (image["height"], image["width"]),
            "objects": ground_truth(objects[image["id"]], labels),
        }
        for image in sorted(coco["images"], key=lambda image: image["id"])
    ]


def ground_truth(objects: list[dict[str, Any]], labels: dict[int, int]) -> dict[str, Any]:
    """Returns boxes (xywh, pixels), labels and crowd flags of the objects of an image."""
    return {
        "boxes": np.array([found["bbox"] for found in objects], np.float32).reshape(-1, 4),
        "labels": np.array([labels[found["category_id"]] for found in objects], np.int64),
        "iscrowd": np.array([found.get("iscrowd", 0) for found in objects], bool),
    }


def undone(images: list[dict[str, Any]], output: Path, index: int, count: int) -> Iterator[dict[str, Any]]:
    """Yields the images of one worker of `count` whose file is not there yet."""
    for image in images[index::count]:
        if not (output / f"{image['id']}.npz").exists():
            yield image


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Writes a file as a whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez_compressed(file, **arrays)
    Path(file.name).replace(path)


def assign(client: Client, image: dict[str, Any], output: Path) -> int:
    """Has the targets of an image assigned, writes them, and returns the number of positive locations."""
    assigner = FCOSAssigner(box_format="xywh")
    targets = client.assign_targets(assigner, [image["objects"]], image_size=image["size"], sparse=True)
    names = ("locations", "labels", "ltrb", "centerness", "matched", "ignored")
    write(output / f"{image['id']}.npz", {name: getattr(targets, name) for name in names})
    return sum(targets.positive_counts)


def run(options: argparse.Namespace) -> None:
    """Does this worker's share, some images at a time; says in one line of JSON what it did."""
    options.output.mkdir(parents=True, exist_ok=True)
    images = list(undone(read_images(options.annotations), options.output, options.index, options.count))
    with Client(options.target, timeout=60.0) as client, ThreadPoolExecutor(options.concurrency) as pool:
        positives = list(pool.map(lambda image: assign(client, image, options.output), images))
    print(json.dumps({"worker": options.index, "images": len(positives), "positives": sum(positives)}))


def main() -> None:
    """Reads the options; what a Job sets comes from the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="COCO annotations")
    parser.add_argument("output", type=Path, help="directory of the targets")
    parser.add_argument("--target", default=os.environ.get("LOSSD_TARGET", "localhost:50051"))
    parser.add_argument("--index", type=int, default=os.environ.get("JOB_COMPLETION_INDEX", "0"))
    parser.add_argument("--count", type=int, default=os.environ.get("WORKER_COUNT", "1"))
    parser.add_argument("--concurrency", type=int, default=8, help="calls at a time")
    try:
        run(parser.parse_args())
    except (LossdError, OSError, ValueError, KeyError) as error:
        sys.exit(f"pipeline_worker: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
