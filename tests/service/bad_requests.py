"""Bad losses, one row each: what is wrong with it, and how it must be refused."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lossd.tensors import pack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from tests.service.support import CASES, loss_request


@dataclass(frozen=True)
class Bad:
    """One row: a good request, what spoils it, and the refusal it must get."""

    name: str
    good: Callable[[], Any]
    spoil: Callable[[Any], object]
    code: str
    reason: str
    field: str
    metadata: dict[str, str] = field(default_factory=dict)

    def request(self) -> Any:
        request = self.good()
        self.spoil(request)
        return request


def good(name: str) -> Callable[[], pb.ComputeLossRequest]:
    def make() -> pb.ComputeLossRequest:
        case = CASES[name]
        return loss_request(case.config, [case.arrays(np.random.default_rng(3), 2)])

    return make


def custom(name: str, **settings: Any) -> Callable[[], pb.ComputeLossRequest]:
    config = losses_pb2.CustomLoss(name=name)
    return lambda: loss_request(config, [{"pred": np.ones((2, 3), np.float32)}], **settings)


focal, giou, centerness, dense, truth = map(good, ("focal", "giou", "centerness", "fcos-dense", "fcos-truth"))


def on_item(change: Callable[[Any], object]) -> Callable[[Any], object]:
    """Spoils the inputs of the first item."""
    return lambda request: change(getattr(request.items[0], request.items[0].WhichOneof("inputs")))


def put(name: str, array: Any, level: int | None = None) -> Callable[[Any], object]:
    """Replaces an input of the first item."""

    def change(inputs: Any) -> None:
        target = getattr(inputs, name)
        (target if level is None else target[level]).CopyFrom(pack(np.asarray(array)))

    return on_item(change)


def put_truth(name: str, array: Any) -> Callable[[Any], object]:
    """Replaces a field of the first image's objects, of a loss or of an assignment."""

    def change(request: Any) -> None:
        item = request.items[0]
        holder = item if isinstance(item, pb.AssignItem) else item.fcos
        getattr(holder.ground_truth[0], name).CopyFrom(pack(np.asarray(array)))

    return change


def merge(**fields: Any) -> Callable[[Any], object]:
    """Sets fields of the request itself."""
    return lambda request: request.MergeFrom(type(request)(**fields))


def reshape(*shape: int) -> Callable[[Any], object]:
    """Gives the logits another shape."""

    def change(inputs: Any) -> None:
        inputs.inputs.shape[:] = shape

    return on_item(change)


def set_dtype(name: str, dtype: int) -> Callable[[Any], object]:
    return on_item(lambda inputs: setattr(getattr(inputs, name), "dtype", dtype))


F32 = np.float32
INVALID = "INVALID_ARGUMENT"
INPUTS, TARGETS = "items[0].focal.inputs", "items[0].focal.targets"
FOCAL, GIOU, FCOS = losses_pb2.FocalLoss, losses_pb2.GIoULoss, losses_pb2.FCOSLoss
nan_logits = np.array([[0, 0, math.nan, 0, 0], [math.inf, 0, 0, 0, 0]], F32)


def strict_nan(request: Any) -> None:
    put("inputs", nan_logits)(request)
    request.strict = True


def short(request: Any) -> None:
    request.items[0].focal.inputs.inline = b"123456789"


def stored_otherwise(request: Any) -> None:
    tensor = request.items[0].focal.inputs
    tensor.ClearField("inline")
    tensor.MergeFromString(b"\x2a\x02\x08\x01")  # field 5, a message


def without(name: str) -> Callable[[Any], object]:
    return on_item(lambda inputs: inputs.ClearField(name))


def ranges(*pairs: tuple[float, float]) -> losses_pb2.FCOSAssigner:
    return losses_pb2.FCOSAssigner(
        regress_ranges=[losses_pb2.RegressRange(min=low, max=high) for low, high in pairs]
    )


# fmt: off
LOSS = [
    # Tensors.
    Bad("short-storage", focal, short, INVALID, "INVALID_TENSOR", INPUTS,
        {"length": "9", "expected": "40", "dtype": "float32", "shape": "[2, 5]"}),
    Bad("long-for-shape", focal, reshape(2, 4), INVALID, "INVALID_TENSOR", INPUTS, {"length": "40"}),
    Bad("negative-extent", focal, reshape(2, -5), INVALID, "INVALID_SHAPE", INPUTS, {"extent": "-5"}),
    Bad("two-negative-extents", focal, reshape(-2, -5), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("overflowing-shape", focal, reshape(2**40, 2**40), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("overflow-to-the-length", focal, reshape(2**62, 4, 10), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("overflow-by-zero", focal, reshape(0, 2**62), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("too-many-dimensions", focal, reshape(*[1] * 65), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("huge-but-fitting", focal, reshape(2**30, 5), INVALID, "INVALID_TENSOR", INPUTS),
    Bad("unknown-dtype", focal, set_dtype("inputs", 99), INVALID, "INVALID_DTYPE", INPUTS, {"dtype": "99"}),
    Bad("no-dtype", focal, set_dtype("targets", 0), INVALID, "INVALID_DTYPE", TARGETS, {"dtype": "0"}),
    Bad("no-storage", focal, on_item(lambda i: i.inputs.ClearField("inline")),
        INVALID, "INVALID_TENSOR", INPUTS, {"length": "0"}),
    Bad("storage-of-a-later-contract", focal, stored_otherwise, INVALID, "INVALID_TENSOR", INPUTS,
        {"length": "0"}),
    # Focal inputs.
    Bad("integer-logits", focal, put("inputs", np.zeros((2, 5), np.int32)), INVALID, "INVALID_DTYPE", INPUTS,
        {"value": "int32"}),
    Bad("float-labels", focal, put("targets", np.zeros(2, F32)), INVALID, "INVALID_DTYPE", TARGETS),
    Bad("label-too-high", focal, put("targets", [1, 5]), INVALID, "LABEL_OUT_OF_RANGE", TARGETS,
        {"position": "[1]", "value": "5", "lowest": "-1", "highest": "4"}),
    Bad("label-too-low", focal, put("targets", [-2, 0]), INVALID, "LABEL_OUT_OF_RANGE", TARGETS,
        {"position": "[0]", "value": "-2"}),
    Bad("label-beyond-int64", focal, put("targets", np.array([0, 2**64 - 1], np.uint64)),
        INVALID, "LABEL_OUT_OF_RANGE", TARGETS, {"position": "[1]", "value": str(2**64 - 1)}),
    Bad("label-count", focal, put("targets", [1, 2, 3]), INVALID, "INVALID_SHAPE", TARGETS,
        {"value": "[3]", "expected": "[2]"}),
    Bad("logits-of-rank-3", focal, put("inputs", np.zeros((2, 5, 1), F32)), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("scalar-logits", focal, put("inputs", F32(0)), INVALID, "INVALID_SHAPE", INPUTS),
    Bad("no-classes", focal, put("inputs", np.zeros((2, 0), F32)), INVALID, "LABEL_OUT_OF_RANGE", TARGETS),
    Bad("nan-under-strict", focal, strict_nan, INVALID, "NOT_FINITE", INPUTS,
        {"count": "2", "position": "[0, 2]"}),
    Bad("no-targets", focal, without("targets"), INVALID, "MISSING_FIELD", TARGETS),
    # Boxes and centerness.
    Bad("inverted-target", giou, put("target_boxes", np.array([[0, 0, 4, 4], [5, 0, 4, 4]], F32)),
        INVALID, "INVERTED_BOX", "items[0].giou.target_boxes", {"index": "1"}),
    Bad("weights-of-rank-2", giou, put("weights", np.ones((2, 1), F32)),
        INVALID, "INVALID_SHAPE", "items[0].giou.weights", {"value": "[2, 1]", "expected": "[2]"}),
    Bad("boxes-of-five", giou, put("pred_boxes", np.ones((2, 5), F32)),
        INVALID, "INVALID_SHAPE", "items[0].giou.pred_boxes"),
    Bad("box-count", giou, put("target_boxes", np.ones((3, 4), F32)),
        INVALID, "INVALID_SHAPE", "items[0].giou.target_boxes"),
    Bad("centerness-above-1", centerness, put("target", np.array([[0.5], [1.5]], F32)),
        INVALID, "VALUE_OUT_OF_RANGE", "items[0].centerness.target", {"position": "[1, 0]", "value": "1.5"}),
    Bad("centerness-nan", centerness, put("target", np.array([[math.nan], [1]], F32)),
        INVALID, "VALUE_OUT_OF_RANGE", "items[0].centerness.target", {"value": "nan"}),
    Bad("centerness-rows", centerness, put("target", np.ones(3, F32)),
        INVALID, "INVALID_SHAPE", "items[0].centerness.target"),
    Bad("centerness-weight-rows", centerness, put("weights", np.ones(3, F32)),
        INVALID, "INVALID_SHAPE", "items[0].centerness.weights"),
    # FCOS.
    Bad("mismatched-levels", dense, on_item(lambda i: i.reg_preds.pop()),
        INVALID, "INVALID_SHAPE", "items[0].fcos.reg_preds", {"value": "1", "expected": "2"}),
    Bad("mismatched-target-levels", dense, on_item(lambda i: i.cls_targets.pop()),
        INVALID, "INVALID_SHAPE", "items[0].fcos.cls_targets"),
    Bad("no-levels", dense, without("cls_preds"), INVALID, "MISSING_FIELD", "items[0].fcos.cls_preds"),
    Bad("num-classes-mismatch", dense, merge(fcos=FCOS(num_classes=7)),
        INVALID, "INVALID_SHAPE", "items[0].fcos.cls_preds[0]"),
    Bad("level-size-mismatch", dense, put("centerness_preds", np.ones((2, 1, 4, 5), F32), 1),
        INVALID, "INVALID_SHAPE", "items[0].fcos.centerness_preds[1]"),
    Bad("dense-label", dense, put("cls_targets", np.full((2, 4, 6), 3), 1),
        INVALID, "LABEL_OUT_OF_RANGE", "items[0].fcos.cls_targets[1]",
        {"position": "[0, 0, 0]", "value": "3"}),
    Bad("both-kinds-of-targets", dense,
        on_item(lambda i: i.ground_truth.extend(truth().items[0].fcos.ground_truth)),
        INVALID, "UNEXPECTED_FIELD", "items[0].fcos.cls_targets"),
    Bad("one-image-missing", truth, on_item(lambda i: i.ground_truth.pop()),
        INVALID, "INVALID_SHAPE", "items[0].fcos.ground_truth", {"value": "1", "expected": "2"}),
    Bad("truth-label", truth, put_truth("labels", [0, 1, 2, 3]),
        INVALID, "LABEL_OUT_OF_RANGE", "items[0].fcos.ground_truth[0].labels",
        {"position": "[3]", "value": "3"}),
    Bad("truth-ignored-label", truth, put_truth("labels", [0, -1, 2, 2]),
        INVALID, "LABEL_OUT_OF_RANGE", "items[0].fcos.ground_truth[0].labels", {"value": "-1"}),
    # The request.
    Bad("no-loss", focal, lambda r: r.ClearField("focal"), INVALID, "MISSING_FIELD", "loss"),
    Bad("no-items", focal, lambda r: r.ClearField("items"), INVALID, "MISSING_FIELD", "items",
        {"value": "0"}),
    Bad("other-kind-of-item", focal, lambda r: r.items[0].CopyFrom(giou().items[0]),
        INVALID, "UNEXPECTED_FIELD", "items[0].giou", {"value": "giou", "loss": "focal"}),
    Bad("no-inputs", focal, lambda r: r.items[0].ClearField("focal"),
        INVALID, "MISSING_FIELD", "items[0].focal"),
    Bad("unknown-gradient", focal, merge(gradients=["inputs", "targets"]),
        INVALID, "INVALID_OPTION", "gradients[1]", {"value": "targets"}),
    Bad("integer-gradients", focal, merge(gradient_dtype=8), INVALID, "INVALID_OPTION", "gradient_dtype",
        {"value": "8"}),
    Bad("unknown-gradient-dtype", focal, merge(gradient_dtype=99), INVALID, "INVALID_OPTION",
        "gradient_dtype"),
    Bad("unknown-preset", dense, merge(fcos=FCOS(preset=77)), INVALID, "INVALID_OPTION", "fcos.preset",
        {"value": "77"}),
    Bad("unknown-reduction", focal, merge(focal=FOCAL(reduction=9)), INVALID, "INVALID_OPTION",
        "focal.reduction", {"value": "9"}),
    Bad("alpha-above-1", focal, merge(focal=FOCAL(alpha=1.5)), INVALID, "INVALID_OPTION", "focal.alpha",
        {"value": "1.5"}),
    Bad("alpha-nan", focal, merge(focal=FOCAL(alpha=math.nan)), INVALID, "INVALID_OPTION", "focal.alpha"),
    Bad("negative-gamma", focal, merge(focal=FOCAL(gamma=-1)), INVALID, "INVALID_OPTION", "focal.gamma",
        {"value": "-1.0"}),
    Bad("infinite-gamma", focal, merge(focal=FOCAL(gamma=math.inf)), INVALID, "INVALID_OPTION",
        "focal.gamma"),
    Bad("eps-0", giou, merge(giou=GIOU(eps=0)), INVALID, "INVALID_OPTION", "giou.eps"),
    Bad("negative-weight", dense, merge(fcos=FCOS(reg_weight=-1)), INVALID, "INVALID_OPTION",
        "fcos.reg_weight"),
    Bad("num-classes-0", dense, lambda r: r.fcos.ClearField("num_classes"), INVALID, "INVALID_OPTION",
        "fcos.num_classes"),
    Bad("loss-ranges-count", truth, merge(fcos=FCOS(assigner=ranges((-1, 5)))), INVALID, "INVALID_OPTION",
        "fcos.assigner.regress_ranges", {"value": "1", "expected": "5"}),
    Bad("normalizer-0", focal, lambda r: setattr(r.items[0], "normalizer", 0.0),
        INVALID, "INVALID_OPTION", "items[0].normalizer"),
    Bad("normalizer-of-a-sum", good("focal-grid"), lambda r: setattr(r.items[0], "normalizer", 4.0),
        INVALID, "UNEXPECTED_FIELD", "items[0].normalizer", {"value": "4.0"}),
]
CUSTOM = [
    Bad("unknown-custom", custom("Nowhere"), id, "NOT_FOUND", "UNKNOWN_CUSTOM_LOSS", "custom.name",
        {"value": "Nowhere"}),
    Bad("no-custom-name", custom(""), id, "NOT_FOUND", "UNKNOWN_CUSTOM_LOSS", "custom.name"),
    Bad("unknown-input", custom("Rows"), on_item(lambda i: i.tensors["extra"].CopyFrom(i.tensors["pred"])),
        INVALID, "UNEXPECTED_FIELD", "items[0].custom.tensors[extra]"),
    Bad("missing-input", custom("Squared"), id, INVALID, "MISSING_FIELD", "items[0].custom.tensors[target]"),
    Bad("short-custom", custom("Rows"), on_item(lambda i: setattr(i.tensors["pred"], "inline", b"1")),
        INVALID, "INVALID_TENSOR", "items[0].custom.tensors[pred]", {"length": "1"}),
    Bad("custom-gradient", custom("Rows", gradients=["loss"]), id, INVALID, "INVALID_OPTION", "gradients[0]"),
    Bad("custom-normalizer", custom("Rows", normalizer=2.0), id, INVALID, "UNEXPECTED_FIELD",
        "items[0].normalizer"),
    Bad("custom-components", custom("Rows", component_gradients=True), id, INVALID, "UNEXPECTED_FIELD",
        "component_gradients"),
    *(Bad(name, custom(name), id, "INTERNAL", "CUSTOM_LOSS_FAILED", "items[0].custom", {"loss": name})
      for name in ("Raises", "NoTensor", "NoTotal", "Whole", "Float8")),
    Bad("Detached", custom("Detached", gradients=["pred"]), id, "INTERNAL", "CUSTOM_LOSS_FAILED",
        "items[0].custom"),
]
# fmt: on
