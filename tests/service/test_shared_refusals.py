"""Every way to be wrong about shared memory."""

import grpc
import numpy as np
import pytest

from lossd.v1 import tensor_pb2
from tests.service.sharing import REGION_BYTES, focal, tensors_of
from tests.service.support import (
    CASES,
    loss_request,
    refusal,
)


def _offset(tensor_offset):
    def change(item, caller):
        item.focal.inputs.shared.offset = tensor_offset

    return change


def _output(**changes):
    def change(item, caller):
        for name, value in changes.items():
            setattr(item.outputs[0].slices[0], name, value)

    return change


def _other_region(item, caller):
    item.focal.inputs.shared.region_id = bytes(16)


def _short_id(item, caller):
    item.focal.targets.shared.region_id = caller.region_id[:15]


def _long_id(item, caller):
    item.focal.targets.shared.region_id = caller.region_id * 1000


def _no_id(item, caller):
    item.outputs[0].slices[0].region_id = b""


def _more(item, caller):
    item.focal.inputs.shape[:] = [1 << 40, 1 << 20]


def _negative(item, caller):
    item.focal.inputs.shape[:] = [-40, 5]


def _untyped(item, caller):
    item.focal.inputs.dtype = 0


def _on_input(item, caller):
    item.outputs[0].slices[0].CopyFrom(item.focal.inputs.shared)


def _on_targets(item, caller):
    item.outputs[0].slices[0].offset = item.focal.targets.shared.offset + 64


def _other_name(item, caller):
    item.outputs[0].input = "targets"


def _twice(item, caller):
    item.outputs.add(input="inputs", slices=[caller.slice(800)])


def _two_slices(item, caller):
    item.outputs[0].slices.append(caller.slice(800))


def _no_slices(item, caller):
    del item.outputs[0].slices[:]


INPUTS, SLICE = "items[0].focal.inputs", "items[0].outputs[0].slices[0]"
WRONG = {
    "offset that is not aligned": (_offset(8), "INVALID_SLICE", f"{INPUTS}.shared"),
    "offset below 0": (_offset(-64), "INVALID_SLICE", f"{INPUTS}.shared"),
    "offset at the end": (_offset(REGION_BYTES), "INVALID_SLICE", f"{INPUTS}.shared"),
    "offset near 2^63": (_offset(2**63 - 64), "INVALID_SLICE", f"{INPUTS}.shared"),
    "shape beyond the region": (_more, "INVALID_SHAPE", INPUTS),
    "negative extent": (_negative, "INVALID_SHAPE", INPUTS),
    "no type": (_untyped, "INVALID_DTYPE", INPUTS),
    "unknown region": (_other_region, "UNKNOWN_REGION", INPUTS),
    "id too short": (_short_id, "UNKNOWN_REGION", "items[0].focal.targets"),
    "id too long": (_long_id, "UNKNOWN_REGION", "items[0].focal.targets"),
    "output without a region": (_no_id, "UNKNOWN_REGION", SLICE),
    "output beyond the region": (_output(offset=REGION_BYTES - 64), "INVALID_SLICE", f"{SLICE}.shared"),
    "output that is not aligned": (_output(offset=4), "INVALID_SLICE", f"{SLICE}.shared"),
    "output on its input": (_on_input, "INVALID_SLICE", SLICE),
    "output on the labels": (_on_targets, "INVALID_SLICE", SLICE),
    "output for what has no gradient": (_other_name, "INVALID_OPTION", "items[0].outputs[0].input"),
    "two outputs for one gradient": (_twice, "INVALID_OPTION", "items[0].outputs[1].input"),
    "two slices for one tensor": (_two_slices, "INVALID_SHAPE", "items[0].outputs[0].slices"),
    "no slice": (_no_slices, "INVALID_SHAPE", "items[0].outputs[0].slices"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_written(caller, name):
    change, reason, field = WRONG[name]
    request, item = focal(caller)
    change(item, caller)
    before = caller.memory.copy()
    refused = refusal(caller.stub.ComputeLoss, request)
    assert (refused.reason, refused.violations) == (reason, (field,))
    wanted = "NOT_FOUND" if reason == "UNKNOWN_REGION" else "INVALID_ARGUMENT"
    assert refused.code is grpc.StatusCode[wanted]
    assert caller.region_id.hex() not in repr(refused)
    assert np.array_equal(caller.memory, before)


def test_outputs_of_two_items_may_not_overlap(caller):
    request, item = focal(caller)
    request.items.append(item)
    refused = refusal(caller.stub.ComputeLoss, request)
    assert refused.reason == "INVALID_SLICE"
    request.items[1].ClearField("outputs")
    assert len(caller.stub.ComputeLoss(request).results) == 2


def test_one_slice_named_many_times_is_not_many_times_the_work(caller):
    request, item = focal(caller)
    item.ClearField("outputs")
    item.focal.inputs.shape[:] = [REGION_BYTES // 32, 8]
    item.focal.inputs.shared.offset = 0
    item.focal.targets.CopyFrom(
        tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_INT8, shape=[REGION_BYTES // 32], inline=bytes(1 << 15))
    )
    caller.memory[:] = 0
    request.items.append(item)
    assert len(caller.stub.ComputeLoss(request).results) == 2
    request.items.append(item)
    refused = refusal(caller.stub.ComputeLoss, request)
    assert (refused.code.name, refused.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert refused.violations == ("items[2].focal.inputs.shared",)


def test_bools_are_checked_in_a_copy(caller):
    case = CASES["fcos-dense"]
    arrays = case.arrays(np.random.default_rng(8), 1)
    arrays["ignored_targets"] = [np.zeros_like(level, bool) for level in arrays["cls_targets"]]
    request = loss_request(case.config, [arrays])
    bools = request.items[0].fcos.ignored_targets[0]
    bools.inline = b"\2" + bools.inline[1:]
    for tensor in tensors_of(request).values():
        caller.share(tensor)
    refused = refusal(caller.stub.ComputeLoss, request)
    assert (refused.reason, refused.violations) == (
        "INVALID_TENSOR",
        ("items[0].fcos.ignored_targets[0]",),
    )
