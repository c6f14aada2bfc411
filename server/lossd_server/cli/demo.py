"""`lossd demo`: a server, its targets, and a detector head that is fitted through it."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lossd_client import Client, FCOSAssigner, FCOSLoss, LossResult
from lossd_server.config import ServerConfig
from lossd_server.engine import keep_freed_memory
from lossd_server.errors import LossdError
from lossd_server.rpc import Server
from lossd_server.scenes import NUM_CLASSES, Scene, make_scenes, read_scenes

IMAGE_SIZE = (800, 1024)
BATCH_SIZE = 2
STRIDES = (8, 16, 32, 64, 128)
INPUTS = ("cls_preds", "reg_preds", "centerness_preds")
TERMS = ("cls_loss", "reg_loss", "centerness_loss", "total_loss")

_RATES = {"cls_preds": 4.0, "reg_preds": 0.25, "centerness_preds": 2.0}
"""Step size a positive: gradients are divided by the number of positives."""

Levels = list[NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One step of the descent: what came back, and how long it took in all."""

    result: LossResult
    seconds: float


def run(*, coco: Path | None, steps: int, device: str, console: Console) -> None:
    """Runs the demo; exits with 1 and one line where it cannot."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    keep_freed_memory()
    try:
        scenes = read_scenes(coco, BATCH_SIZE, IMAGE_SIZE) if coco else make_scenes(BATCH_SIZE, IMAGE_SIZE)
        config = ServerConfig(listen=("127.0.0.1:0",), metrics_port=None, device=device)
        with Server(config) as server, Client(server.addresses[0]) as client:
            _show(client, server.addresses[0], scenes, steps, console)
    except (LossdError, ValueError) as error:
        sys.exit(f"lossd: {error}")


def _show(client: Client, address: str, scenes: Sequence[Scene], steps: int, console: Console) -> None:
    info = client.server_info()
    console.print(f"lossd {info.version} on {info.devices[0]}, listening on {address}")
    targets = client.assign_targets(FCOSAssigner(strides=STRIDES), scenes, image_size=IMAGE_SIZE)
    objects = sum(len(scene["labels"]) for scene in scenes)
    positives = sum(targets.positive_counts)
    console.print(
        f"{len(scenes)} scenes of {IMAGE_SIZE[0]}×{IMAGE_SIZE[1]} with {objects} objects: "
        f"{positives} positive locations of {sum(h * w for h, w in targets.feature_sizes) * len(scenes)}"
    )
    head = _untrained_head(targets.feature_sizes)
    megabytes = sum(level.nbytes for levels in head.values() for level in levels) / 1e6
    console.print(f"fitting a head of {megabytes:.1f} MB, values and gradients by one call a step")
    taken = list(_descend(client, head, scenes, steps, console))
    console.print(_loss_table(taken))
    console.print(_positives_table(targets.positive_counts, targets.feature_sizes))
    console.print(_latency_table(taken))


def _untrained_head(sizes: Sequence[tuple[int, int]]) -> dict[str, Levels]:
    """Returns outputs as a fresh head gives them: rare classes, middling boxes, any centerness."""
    rng = np.random.default_rng(1)
    head: dict[str, Levels] = {name: [] for name in INPUTS}
    for stride, (height, width) in zip(STRIDES, sizes, strict=True):
        shape = (BATCH_SIZE, NUM_CLASSES, height, width)
        head["cls_preds"].append(rng.normal(-4.6, 0.3, shape).astype(np.float32))
        head["reg_preds"].append(
            (4 * stride * rng.lognormal(0, 0.2, (BATCH_SIZE, 4, height, width))).astype(np.float32)
        )
        head["centerness_preds"].append(rng.normal(0, 0.5, (BATCH_SIZE, 1, height, width)).astype(np.float32))
    return head


def _descend(
    client: Client, head: dict[str, Levels], scenes: Sequence[Scene], steps: int, console: Console
) -> Iterator[_Step]:
    """Takes steps of gradient descent on the head's outputs, in place."""
    loss = FCOSLoss(NUM_CLASSES, strides=STRIDES)
    with _progress(console) as progress:
        task = progress.add_task("step", total=steps, loss="")
        for index in range(steps):
            began = time.monotonic()
            result = client.compute_loss(loss, *(head[name] for name in INPUTS), scenes, gradients=True)
            yield _Step(result=result, seconds=time.monotonic() - began)
            _descend_once(head, result)
            progress.update(task, advance=1, loss=f"loss {result.components['total_loss']:.4f}")
            if not console.is_terminal:
                console.print(f"step {index + 1:2d}/{steps}  loss {result.components['total_loss']:.4f}")


def _descend_once(head: dict[str, Levels], result: LossResult) -> None:
    """Moves logits against their gradients, and distances likewise by their logarithms."""
    for name, rate in _RATES.items():
        step = np.float32(rate * result.positive_count)
        for level, gradient in zip(head[name], result.gradients[name], strict=True):
            if name == "reg_preds":
                np.multiply(level, np.exp(-step * gradient * level), out=level)
            else:
                np.subtract(level, step * gradient, out=level)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _loss_table(steps: Sequence[_Step]) -> Table:
    table = _table("loss", "first step", "last step", "fell by")
    first, last = steps[0].result.components, steps[-1].result.components
    for term in TERMS:
        fall = 1 - last[term] / first[term] if first[term] else 0.0
        table.add_row(term, f"{first[term]:.4f}", f"{last[term]:.4f}", f"{fall:.0%}")
    floor = last["centerness_floor"]
    table.add_row("centerness_floor", "", f"{floor:.4f}", "")
    return table


def _positives_table(counts: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Table:
    table = _table("level", "stride", "locations", "positives")
    for level, (stride, (height, width), count) in enumerate(zip(STRIDES, sizes, counts, strict=True)):
        table.add_row(f"P{level + 3}", str(stride), f"{height}×{width}", str(count))
    return table


def _latency_table(steps: Sequence[_Step]) -> Table:
    table = _table("stage", "median", "slowest")
    stages = {stage: [step.result.timings[stage] for step in steps] for stage in steps[0].result.timings}
    whole = [step.seconds for step in steps]
    elsewhere = [w - sum(s) for w, s in zip(whole, zip(*stages.values(), strict=True), strict=True)]
    rows = {**stages, "client and wire": elsewhere, "whole call": whole}
    for stage, seconds in rows.items():
        table.add_row(stage, f"{np.median(seconds) * 1e3:.2f} ms", f"{max(seconds) * 1e3:.2f} ms")
    return table


def _table(*columns: str) -> Table:
    """Returns an empty table: names to the left, figures to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold", title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
