"""The case of a small FCOS head: what a call is beside the loss itself."""

from collections.abc import Callable

import torch

from lossd_client import Client
from lossd_client import FCOSLoss as FCOSConfig
from lossd_server.bench import inputs
from lossd_server.bench.bare_calls import bare_call
from lossd_server.bench.case import Case, CaseSpec, Outcome, Path, Workbench, eager_call
from lossd_server.bench.child import ECHO
from lossd_server.bench.loss_cases import eager_documented, evaluate
from lossd_server.bench.transport_cases import engine_call
from lossd_server.losses import FCOSLoss
from lossd_server.targets import DEFAULT_STRIDES, feature_sizes

_IMAGE, _BOXES = (128, 128), 3


def head_cases() -> list[CaseSpec]:
    """Returns the case."""
    height, width = _IMAGE
    title = (
        f"FCOS head by call, {height}x{width}, {inputs.CLASSES} classes, {_BOXES} boxes, value and gradients"
    )
    return [CaseSpec(name="rpc-fcos", title=title, build=_head_by_call)]


def _head_by_call(bench: Workbench) -> Case:
    preds = inputs.head_outputs(1, feature_sizes(_IMAGE, DEFAULT_STRIDES))
    boxes, labels = inputs.boxes_and_labels(_BOXES, _IMAGE, seed=30)
    eager, targets = eager_documented([boxes], [labels])
    loss = FCOSLoss(inputs.CLASSES)
    named = dict(zip(loss.differentiable, preds, strict=True))
    arrays = {name: [level.numpy() for level in levels] for name, levels in named.items()}
    objects = [{"boxes": boxes.numpy(), "labels": labels.numpy()}]
    flat = [level for kind in preds for level in kind]
    return Case(
        paths=(
            Path(name="eager", call=eager_call(eager, flat, gradients=True, dtype=torch.float32)),
            Path(name="evaluate", call=lambda: evaluate(loss, {**named, **targets}, gradients=True)),
            Path(
                name="engine",
                call=engine_call(bench, loss, {**arrays, "ground_truth": objects}, gradients=True),
            ),
            Path(name="rpc", call=_call(bench, [*arrays.values(), objects])),
            Path(name="bare", call=bare_call(bench, flat, method=ECHO)),
        ),
        base="eager",
        oracle=eager_call(eager, flat, gradients=True, dtype=torch.float64),
    )


def _call(bench: Workbench, arguments: list[object]) -> Callable[[], Outcome]:
    client = bench.resources.enter_context(Client(bench.child().address))
    config = FCOSConfig(inputs.CLASSES)

    def compute() -> Outcome:
        result = client.compute_loss(config, *arguments, gradients=True)
        return [result.loss, *(level for levels in result.gradients.values() for level in levels)]

    return compute
