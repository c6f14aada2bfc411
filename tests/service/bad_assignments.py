"""Bad assignments, one row each: what is wrong with it, and how it must be refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from tests.service.bad_requests import F32, INVALID, Bad, merge, put_truth, ranges
from tests.service.support import assign_request, scene

IMAGE = "items[0].ground_truth[0]"


def assignment() -> pb.AssignTargetsRequest:
    return assign_request([scene(np.random.default_rng(3), (64, 96), 3)])


def size(height: int, width: int) -> Callable[[Any], object]:
    return lambda r: r.items[0].image_size.CopyFrom(pb.Size(height=height, width=width))


def stray_bool(request: Any) -> None:
    put_truth("iscrowd", np.array([True, False, True]))(request)
    request.items[0].ground_truth[0].iscrowd.inline = b"\x01\x02\x00"


# fmt: off
ASSIGN = [
    Bad("missing-boxes", assignment, lambda r: r.items[0].ground_truth[0].ClearField("boxes"),
        INVALID, "MISSING_FIELD", f"{IMAGE}.boxes"),
    Bad("missing-labels", assignment, lambda r: r.items[0].ground_truth[0].ClearField("labels"),
        INVALID, "MISSING_FIELD", f"{IMAGE}.labels"),
    Bad("inverted", assignment, put_truth("boxes", np.array([[0, 0, 1, 1], [0, 9, 9, 2], [0, 0, 1, 1]], F32)),
        INVALID, "INVERTED_BOX", f"{IMAGE}.boxes", {"index": "1"}),
    Bad("infinite-box", assignment, put_truth("boxes", np.array([[0, 0, math.inf, 1]] * 3, F32)),
        INVALID, "NOT_FINITE", f"{IMAGE}.boxes", {"position": "[0, 2]", "value": "inf"}),
    Bad("negative-label", assignment, put_truth("labels", [0, -1, 0]),
        INVALID, "LABEL_OUT_OF_RANGE", f"{IMAGE}.labels", {"value": "-1"}),
    Bad("label-beyond-int64", assignment, put_truth("labels", np.array([0, 0, 2**63], np.uint64)),
        INVALID, "LABEL_OUT_OF_RANGE", f"{IMAGE}.labels", {"position": "[2]"}),
    Bad("label-count", assignment, put_truth("labels", [0, 1]), INVALID, "INVALID_SHAPE", f"{IMAGE}.labels"),
    Bad("crowd-count", assignment, put_truth("iscrowd", [0]), INVALID, "INVALID_SHAPE", f"{IMAGE}.iscrowd"),
    Bad("stray-bool", assignment, stray_bool, INVALID, "INVALID_TENSOR", f"{IMAGE}.iscrowd",
        {"position": "1", "value": "2"}),
    Bad("no-size", assignment, lambda r: r.items[0].ClearField("image_size"),
        INVALID, "MISSING_FIELD", "items[0].image_size"),
    Bad("both-sizes", assignment, lambda r: r.items[0].feature_sizes.add(height=1, width=1),
        INVALID, "UNEXPECTED_FIELD", "items[0].image_size"),
    Bad("negative-size", assignment, size(64, -5), INVALID, "VALUE_OUT_OF_RANGE", "items[0].image_size.width",
        {"value": "-5"}),
    Bad("large-image", assignment, size(8000, 8000), "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", "items"),
    Bad("no-items", assignment, lambda r: r.ClearField("items"), INVALID, "MISSING_FIELD", "items"),
    Bad("unknown-format", assignment, merge(format=12), INVALID, "INVALID_OPTION", "format", {"value": "12"}),
    Bad("unknown-assigner", assignment, merge(assigner=losses_pb2.FCOSAssigner(preset=5)),
        INVALID, "INVALID_OPTION", "assigner.preset", {"value": "5"}),
    Bad("unknown-box-format", assignment, merge(assigner=losses_pb2.FCOSAssigner(box_format=5)),
        INVALID, "INVALID_OPTION", "assigner.box_format"),
    Bad("ranges-count", assignment, merge(assigner=ranges((-1, 64), (64, 128))),
        INVALID, "INVALID_OPTION", "assigner.regress_ranges", {"value": "2", "expected": "5"}),
    Bad("strides-without-ranges", assignment, merge(assigner=losses_pb2.FCOSAssigner(strides=[8, 16])),
        INVALID, "INVALID_OPTION", "assigner.regress_ranges"),
    Bad("empty-range", assignment, merge(assigner=ranges(*[(8, 8)] * 5)),
        INVALID, "INVALID_OPTION", "assigner.regress_ranges[0]"),
    Bad("stride-0", assignment, merge(assigner=losses_pb2.FCOSAssigner(strides=[8, 0, 1, 1, 1])),
        INVALID, "INVALID_OPTION", "assigner.strides[1]", {"value": "0"}),
]
# fmt: on
