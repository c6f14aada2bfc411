"""What the losses refuse: the reason, the field, and the first offender."""

import math

import pytest
import torch

from lossd_server.errors import InvalidInputError, Reason
from lossd_server.losses import CenternessLoss, FCOSLoss, FocalLoss, GIoULoss

LONG = torch.int64


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def labels(*values):
    return torch.tensor(values)


def boxes(*values):
    return torch.tensor(values, dtype=torch.float32)


def head(**replaced):
    """Arguments of FCOSLoss(2) on two levels of 3 × 4 and 2 × 2 cells, with some lists replaced."""
    sizes = [(3, 4), (2, 2)]
    arguments = {
        "cls_preds": [zeros(1, 2, *size) for size in sizes],
        "reg_preds": [zeros(1, 4, *size) for size in sizes],
        "centerness_preds": [zeros(1, 1, *size) for size in sizes],
        "cls_targets": [torch.full((1, *size), -1) for size in sizes],
        "reg_targets": [zeros(1, 4, *size) for size in sizes],
        "centerness_targets": [zeros(1, *size) for size in sizes],
    }
    return {**arguments, **replaced}


def truth(**image):
    """Ground truth of one image in place of the dense targets."""
    objects = {"boxes": boxes([0, 0, 9, 9]), "labels": labels(1), **image}
    return {**head(cls_targets=None, reg_targets=None, centerness_targets=None), "ground_truth": [objects]}


ONE_BOX = boxes([0, 0, 9, 9])
FOCAL, GIOU, CENTERNESS = FocalLoss(), GIoULoss(), CenternessLoss()
FCOS = FCOSLoss(2, strides=(8, 16), regress_ranges=((-1, 64), (64, math.inf)))

SHAPE, DTYPE, LABEL = Reason.INVALID_SHAPE, Reason.INVALID_DTYPE, Reason.LABEL_OUT_OF_RANGE
VALUE, BOX, OPTION, MISSING = (
    Reason.VALUE_OUT_OF_RANGE,
    Reason.INVERTED_BOX,
    Reason.INVALID_OPTION,
    Reason.MISSING_FIELD,
)

FOCAL_CASES = {
    "label C": (zeros(3, 2), labels(0, 2, 5), LABEL, r"targets: label at \[1\] is 2, want -1..1"),
    "label below -1": (zeros(2, 2), labels(-1, -2), LABEL, r"label at \[1\] is -2"),
    "label 255 as uint8": (zeros(1, 2), labels(255).to(torch.uint8), LABEL, "is 255"),
    "label 2^63 as uint64": (zeros(1, 2), torch.tensor([2**63], dtype=torch.uint64), LABEL, str(2**63)),
    "label in a map": (
        zeros(1, 2, 2, 2),
        labels([[0, 1], [7, 9]]).reshape(1, 2, 2),
        LABEL,
        r"label at \[0, 1, 0\] is 7",
    ),
    "float labels": (zeros(2, 2), zeros(2), DTYPE, "targets: dtype is float32"),
    "bool labels": (zeros(2, 2), zeros(2, dtype=torch.bool), DTYPE, "targets: dtype is bool"),
    "integer logits": (zeros(2, 2, dtype=LONG), zeros(2, dtype=LONG), DTYPE, "inputs: dtype is int64"),
    "complex logits": (zeros(2, 2, dtype=torch.complex64), zeros(2, dtype=LONG), DTYPE, "inputs"),
    "three dimensions": (zeros(2, 3, 4), zeros(2, 4, dtype=LONG), SHAPE, "inputs"),
    "H and W swapped": (zeros(1, 2, 3, 4), zeros(1, 4, 3, dtype=LONG), SHAPE, "targets"),
    "H·W in one": (zeros(1, 2, 3, 4), zeros(12, dtype=LONG), SHAPE, "targets"),
    "too few labels": (zeros(3, 2), zeros(2, dtype=LONG), SHAPE, "targets"),
    "labels as a column": (zeros(3, 2), zeros(3, 1, dtype=LONG), SHAPE, "targets"),
}


@pytest.mark.parametrize("case", FOCAL_CASES)
def test_focal_loss_refuses(case):
    inputs, targets, reason, message = FOCAL_CASES[case]
    with pytest.raises(InvalidInputError, match=message) as refused:
        FOCAL(inputs, targets)
    assert refused.value.reason is reason


GIOU_CASES = {
    "x2 < x1": ((zeros(2, 4), boxes([0, 0, 1, 1], [5, 0, 4, 9])), BOX, "target_boxes: box 1 is"),
    "y2 < y1": ((zeros(1, 4), boxes([0, 5, 9, 4])), BOX, "target_boxes: box 0 is"),
    "weights as a column": ((zeros(3, 4), zeros(3, 4), zeros(3, 1)), SHAPE, "weights"),
    "one weight for all": ((zeros(3, 4), zeros(3, 4), zeros(1)), SHAPE, "weights"),
    "integer weights": ((zeros(1, 4), zeros(1, 4), zeros(1, dtype=LONG)), DTYPE, "weights"),
    "one target for all": ((zeros(3, 4), zeros(1, 4)), SHAPE, "target_boxes"),
    "five numbers": ((zeros(3, 5), zeros(3, 5)), SHAPE, "pred_boxes"),
    "one flat box": ((zeros(4), zeros(4)), SHAPE, "pred_boxes"),
    "integer predictions": ((zeros(1, 4, dtype=LONG), zeros(1, 4)), DTYPE, "pred_boxes"),
    "bool targets": ((zeros(1, 4), zeros(1, 4, dtype=torch.bool)), DTYPE, "target_boxes"),
}


@pytest.mark.parametrize("case", GIOU_CASES)
def test_giou_loss_refuses(case):
    arguments, reason, message = GIOU_CASES[case]
    with pytest.raises(InvalidInputError, match=message) as refused:
        GIOU(*arguments)
    assert refused.value.reason is reason


CENTERNESS_CASES = {
    "target above 1": ((zeros(3), torch.tensor([0.0, 1.5, 2.0])), VALUE, r"target: value at \[1\] is 1.5"),
    "target below 0": ((zeros(1), torch.tensor([-0.1])), VALUE, "target"),
    "target NaN": ((zeros(1), torch.tensor([math.nan])), VALUE, "target: value at .* is nan"),
    "integer target": ((zeros(1), zeros(1, dtype=LONG)), DTYPE, "target"),
    "integer logits": ((zeros(1, dtype=LONG), zeros(1)), DTYPE, "pred"),
    "H and W swapped": ((zeros(1, 2, 3), zeros(1, 3, 2)), SHAPE, "target"),
    "one target for all": ((zeros(3), zeros(1)), SHAPE, "target"),
    "one weight for all": ((zeros(3), zeros(3), zeros(1)), SHAPE, "weights"),
}


@pytest.mark.parametrize("case", CENTERNESS_CASES)
def test_centerness_loss_refuses(case):
    arguments, reason, message = CENTERNESS_CASES[case]
    with pytest.raises(InvalidInputError, match=message) as refused:
        CENTERNESS(*arguments)
    assert refused.value.reason is reason


POSITIVE = [torch.zeros(1, 3, 4, dtype=LONG), torch.full((1, 2, 2), -1)]
LABEL_9 = [torch.full((1, 3, 4), -1), torch.tensor([[[-1, 0], [9, 9]]])]

FCOS_CASES = {
    "num_classes": (head(cls_preds=[zeros(1, 3, 3, 4), zeros(1, 3, 2, 2)]), SHAPE, r"cls_preds\[0\]"),
    "equal H·W": (head(reg_preds=[zeros(1, 4, 4, 3), zeros(1, 4, 2, 2)]), SHAPE, r"reg_preds\[0\]"),
    "equal H·W of targets": (
        head(centerness_targets=[zeros(1, 2, 6), zeros(1, 2, 2)]),
        SHAPE,
        r"centerness_targets\[0\]",
    ),
    "batch sizes": (head(centerness_preds=[zeros(1, 1, 3, 4), zeros(2, 1, 2, 2)]), SHAPE, r"preds\[1\]"),
    "levels of predictions": (head(reg_preds=[zeros(1, 4, 3, 4)]), SHAPE, "reg_preds: has 1 entries"),
    "levels of targets": (head(cls_targets=POSITIVE[:1]), SHAPE, "cls_targets: has 1 entries"),
    "no levels": (head(cls_preds=[], reg_preds=[], centerness_preds=[]), MISSING, "cls_preds"),
    "no targets": (head(cls_targets=None, reg_targets=None, centerness_targets=None), MISSING, "cls_targets"),
    "some targets": (head(reg_targets=None), MISSING, "reg_targets"),
    "float labels": (head(cls_targets=[zeros(1, 3, 4), zeros(1, 2, 2)]), DTYPE, r"cls_targets\[0\].*float32"),
    "label C": (head(cls_targets=LABEL_9), LABEL, r"cls_targets\[1\]: label at \[0, 1, 0\] is 9"),
    "centerness of a positive": (
        head(cls_targets=POSITIVE, centerness_targets=[torch.full((1, 3, 4), 2.0), zeros(1, 2, 2)]),
        VALUE,
        r"centerness_targets\[0\]: value at \[0, 0, 0\] is 2.0",
    ),
    "both forms": (
        head(ground_truth=[{"boxes": ONE_BOX, "labels": labels(0)}]),
        Reason.UNEXPECTED_FIELD,
        "cls",
    ),
    "images": ({**truth(), "ground_truth": []}, SHAPE, "ground_truth"),
    "no boxes": ({**truth(), "ground_truth": [{"labels": labels(0)}]}, MISSING, r"ground_truth\[0\].boxes"),
    "unknown key": (truth(classes=labels(0)), Reason.UNEXPECTED_FIELD, r"ground_truth\[0\].classes"),
    "label C of a box": (truth(labels=labels(2)), LABEL, r"ground_truth\[0\].labels.*is 2, want 0..1"),
    "label -1 of a box": (truth(labels=labels(-1)), LABEL, r"ground_truth\[0\].labels"),
    "float labels of boxes": (truth(labels=zeros(1)), DTYPE, r"ground_truth\[0\].labels"),
    "inverted box": (truth(boxes=boxes([9, 0, 0, 9])), BOX, r"ground_truth\[0\].boxes: box 0"),
    "NaN box": (truth(boxes=boxes([0, 0, math.nan, 9])), Reason.NOT_FINITE, r"ground_truth\[0\].boxes"),
    "more boxes than labels": (truth(boxes=zeros(2, 4)), SHAPE, r"ground_truth\[0\].labels"),
}


@pytest.mark.parametrize("case", FCOS_CASES)
def test_fcos_loss_refuses(case):
    arguments, reason, message = FCOS_CASES[case]
    with pytest.raises(InvalidInputError, match=message) as refused:
        FCOS(**arguments)
    assert refused.value.reason is reason


def test_fcos_loss_needs_as_many_levels_as_the_assigner_has_strides():
    with pytest.raises(InvalidInputError, match="cls_preds: has 2 entries, want 3"):
        FCOSLoss(2, strides=(8, 16, 32), regress_ranges=((0, 8), (8, 16), (16, 32)))(**truth())
    six = {name: value * 3 for name, value in truth().items() if value and name != "ground_truth"}
    with pytest.raises(InvalidInputError, match="cls_preds: has 6 entries, want 5"):
        FCOSLoss(2)(**six, ground_truth=truth()["ground_truth"])


def test_a_head_of_fewer_levels_takes_the_first_default_strides():
    two = FCOSLoss(2, strides=(8, 16), regress_ranges=((-1, 64), (64, 128)))(**truth())
    assert FCOSLoss(2)(**truth()) == two


SETTINGS = {
    "misspelt reduction": (
        lambda: FocalLoss(reduction="average"),
        "reduction: is 'average', want one of none",
    ),
    "misspelt reduction of boxes": (lambda: GIoULoss("Mean"), "reduction"),
    "misspelt reduction of centerness": (lambda: CenternessLoss(""), "reduction"),
    "alpha above 1": (lambda: FocalLoss(alpha=1.5), "alpha: is 1.5"),
    "alpha NaN": (lambda: FocalLoss(alpha=math.nan), "alpha"),
    "negative gamma": (lambda: FocalLoss(gamma=-0.5), "gamma: is -0.5"),
    "infinite gamma": (lambda: FocalLoss(gamma=math.inf), "gamma"),
    "eps of zero": (lambda: GIoULoss(eps=0), "eps"),
    "focal_alpha": (lambda: FCOSLoss(2, focal_alpha=2), "focal_alpha"),
    "focal_gamma": (lambda: FCOSLoss(2, focal_gamma=-1), "focal_gamma"),
    "no classes": (lambda: FCOSLoss(0), "num_classes"),
    "negative weight": (lambda: FCOSLoss(2, cls_weight=-1), "cls_weight"),
    "NaN weight": (lambda: FCOSLoss(2, reg_weight=math.nan), "reg_weight"),
    "unknown preset": (lambda: FCOSLoss(2, preset="fcos3d"), "preset: is 'fcos3d', want one of autotimm"),
    "ranges and strides": (lambda: FCOSLoss(2, strides=(8, 16)), "regress_ranges"),
    "stride of zero": (lambda: FCOSLoss(2, strides=(0, 1, 2, 3, 4)), r"strides\[0\]"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_refused_when_the_module_is_made(setting):
    make, message = SETTINGS[setting]
    with pytest.raises(InvalidInputError, match=message) as refused:
        make()
    assert refused.value.reason is OPTION


@pytest.mark.parametrize("make", [FocalLoss, GIoULoss, CenternessLoss])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_normalizer_goes_with_a_mean_only(make, reduction):
    with pytest.raises(InvalidInputError, match="normalizer") as refused:
        make(reduction=reduction).check_normalizer(4.0)
    assert refused.value.reason is Reason.UNEXPECTED_FIELD
    make().check_normalizer(4.0)
    FCOS.check_normalizer(4.0)


@pytest.mark.parametrize("module", [FOCAL, GIOU, CENTERNESS, FCOS])
@pytest.mark.parametrize("normalizer", [0.0, -1.0, math.nan, math.inf])
def test_a_normalizer_is_a_number_above_zero(module, normalizer):
    with pytest.raises(InvalidInputError, match="normalizer"):
        module.check_normalizer(normalizer)


@pytest.mark.parametrize("side", [-3.0, math.nan])
def test_target_distances_that_span_no_box_are_refused(side):
    targets = {
        "cls_targets": [torch.tensor([[[0, -1]]])],
        "reg_targets": [torch.tensor([[[[1.0, 1]], [[side, 1]], [[1, -9]], [[1, -9]]]])],
        "centerness_targets": [torch.ones(1, 1, 2)],
    }
    preds = [[torch.zeros(1, channels, 1, 2)] for channels in (2, 4, 1)]
    with pytest.raises(InvalidInputError, match=r"reg_targets\[0\]: distances at \[0, 0, 0\]") as caught:
        FCOSLoss(2)(*preds, **targets)
    assert caught.value.reason is Reason.INVERTED_BOX
