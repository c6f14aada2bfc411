"""Requests of a known form are answered by a recipe: to the byte as they are when they first come."""

from contextlib import closing

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.writing import placed
from lossd_server.config import ServerConfig
from lossd_server.engine import Engine
from lossd_server.errors import InvalidInputError
from lossd_server.losses import FocalLoss
from lossd_server.rpc.caller import Caller
from lossd_server.rpc.forms import Forms, Request, parse
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.service import LossService
from lossd_server.rpc.stages import Stages
from tests.service.support import CASES, assign_request, boxes, floats, loss_request, scene

EXAMPLES = settings(max_examples=150, deadline=None)
FLOATS = ("float32", "float64", "float16", ml_dtypes.bfloat16)
LABELS = ("int8", "uint8", "int16", "int32", "int64", "uint64")
GRADIENT_DTYPES = (
    tensor_pb2.DATA_TYPE_UNSPECIFIED,
    tensor_pb2.DATA_TYPE_FLOAT32,
    tensor_pb2.DATA_TYPE_FLOAT64,
    tensor_pb2.DATA_TYPE_FLOAT16,
    tensor_pb2.DATA_TYPE_BFLOAT16,
)
REDUCTIONS = tuple(losses_pb2.Reduction.values())
NOT_MEANS = (losses_pb2.REDUCTION_SUM, losses_pb2.REDUCTION_NONE)


class Untimed(Stages):
    """Stages that take no time, so that answers can be compared."""

    def timings(self):
        return b""


@pytest.fixture(scope="module")
def service():
    with closing(Engine(torch.device("cpu"))) as engine:
        engine.warm_up()
        yield LossService(engine, Metrics(), ServerConfig())


def answer(method, request):
    """The bytes of an answer, or all that a refusal says."""
    try:
        return b"".join(placed(method(request, Untimed(), Caller())))
    except InvalidInputError as error:
        return error.reason, error.message, error.field, error.values


def known(service, data, first=None):
    """A request of a form that is known, with what was learned of it from requests like it."""
    forms = Forms(pb.ComputeLossRequest)
    for _ in range(2):
        answer(service.compute_loss, forms.read(first or data))
    return forms.read(data)


def assert_answered_alike(service, data, first=None, *, by_recipe):
    """Asserts that a request is answered as if it had come once, also where others of its form came first."""
    parcel = parse(pb.ComputeLossRequest, data)
    expected = answer(service.compute_loss, Request(parcel.message, parcel.payloads))
    request = known(service, data, first)
    assert (request.recipe is not None) is by_recipe
    assert answer(service.compute_loss, request) == expected


def with_a(draw, array, *values):
    """An array of which one element may be another."""
    array = array.copy()
    if array.size and draw(st.integers(0, 3)) == 0:
        array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(values))
    return array


def with_a_stray(draw, array):
    """An array of floats of which one may not be finite."""
    return with_a(draw, array, np.nan, np.inf, -np.inf)


@st.composite
def focal_pairs(draw):
    """A focal loss, arguments that it takes, and arguments like them that it may not take."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = draw(st.sampled_from([(3, 5), (1, 4), (2, 3, 4, 5), (1, 2, 1, 1)]))
    dtype, label_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(LABELS))
    logits = floats(rng, shape).astype(dtype)
    labels = rng.integers(-(label_dtype[0] == "i"), shape[1], shape[:1] + shape[2:]).astype(label_dtype)
    config = losses_pb2.FocalLoss(reduction=draw(st.sampled_from(REDUCTIONS)))
    if draw(st.booleans()):
        config.gamma = draw(st.sampled_from([0.0, 1.5, 3.0]))
    others = {"inputs": with_a_stray(draw, logits), "targets": with_a(draw, labels, shape[1], 100)}
    return config, {"inputs": logits, "targets": labels}, others


@st.composite
def giou_pairs(draw):
    """The same of boxes."""
    rng, count = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(1, 4))
    arrays = {
        "pred_boxes": boxes(rng, count).astype(draw(st.sampled_from(FLOATS))),
        "target_boxes": boxes(rng, count).astype(draw(st.sampled_from(("float32", "float64", "int32")))),
    }
    if draw(st.booleans()):
        arrays["weights"] = rng.random(count).astype(draw(st.sampled_from(FLOATS)))
    others = {
        **arrays,
        "pred_boxes": with_a_stray(draw, arrays["pred_boxes"]),
        "target_boxes": with_a(draw, arrays["target_boxes"], -100, 100),
    }
    return losses_pb2.GIoULoss(reduction=draw(st.sampled_from(REDUCTIONS))), arrays, others


@st.composite
def centerness_pairs(draw):
    """The same of centerness."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = draw(st.sampled_from([(4,), (2, 1, 3)]))
    pred, target = floats(rng, shape).astype(draw(st.sampled_from(FLOATS))), rng.random(shape, np.float32)
    others = {"pred": with_a_stray(draw, pred), "target": with_a(draw, target, 2.0, np.nan)}
    config = losses_pb2.CenternessLoss(reduction=draw(st.sampled_from(REDUCTIONS)))
    return config, {"pred": pred, "target": target}, others


@EXAMPLES
@given(
    pair=st.one_of(focal_pairs(), giou_pairs(), centerness_pairs()),
    has_gradients=st.booleans(),
    gradient_dtype=st.sampled_from(GRADIENT_DTYPES),
    strict=st.booleans(),
    normalizer=st.sampled_from([None, 7.0]),
    count=st.integers(1, 2),
)
def test_a_recipe_answers_to_the_byte_as_a_request_is_that_comes_once(
    service, pair, has_gradients, gradient_dtype, strict, normalizer, count
):
    config, *arguments = pair
    first, other = (
        loss_request(
            config,
            [arrays] * count,
            normalizer=None if config.reduction in NOT_MEANS else normalizer,
            gradients=[*arrays][:has_gradients],
            gradient_dtype=gradient_dtype,
            strict=strict,
        ).SerializeToString()
        for arrays in arguments
    )
    assert_answered_alike(service, other, first, by_recipe=True)


@pytest.mark.parametrize("name", CASES)
def test_what_has_levels_has_no_recipe(service, name):
    case = CASES[name]
    request = loss_request(
        case.config, [case.arrays(np.random.default_rng(3), 4)], gradients=case.module.differentiable
    )
    is_simple = isinstance(
        case.config, losses_pb2.FocalLoss | losses_pb2.GIoULoss | losses_pb2.CenternessLoss
    )
    assert_answered_alike(service, request.SerializeToString(), by_recipe=is_simple)


@pytest.mark.parametrize("corner", [30.0, -1.0, np.nan])
@pytest.mark.parametrize("target_format", [pb.TARGET_FORMAT_SPARSE, pb.TARGET_FORMAT_DENSE])
def test_assignments_have_recipes_that_answer_alike(service, target_format, corner):
    forms, rng = Forms(pb.AssignTargetsRequest), np.random.default_rng(4)
    images = [scene(rng, (64, 96), 3) for _ in range(3)]
    images[-1]["boxes"][1] = [20, 20, corner, 60]
    *first, last = (assign_request([image], format=target_format).SerializeToString() for image in images)
    for data in first:
        service.assign_targets(forms.read(data), Untimed(), Caller())
    request, alone = forms.read(last), parse(pb.AssignTargetsRequest, last)
    assert request.recipe is not None
    found, expected = (
        answer(service.assign_targets, each) for each in (request, Request(alone.message, alone.payloads))
    )
    assert found == expected


def test_tensors_with_nothing_in_them_are_no_exception(service):
    arrays = {"inputs": np.zeros((0, 3), np.float32), "targets": np.zeros(0, np.int64)}
    request = loss_request(losses_pb2.FocalLoss(), [arrays], gradients=["inputs"])
    assert_answered_alike(service, request.SerializeToString(), by_recipe=True)


def test_what_was_learned_before_the_kernels_were_there_does_without_torch_afterwards(service, monkeypatch):
    case = CASES["focal"]
    data = loss_request(case.config, [case.arrays(np.random.default_rng(0), 3)]).SerializeToString()
    with monkeypatch.context() as without:
        without.setattr("lossd_server.engine.affinity.loaded_library", lambda: None)
        request = known(service, data)
    assert request.recipe is not None
    taken, take_job = [], service._engine._evaluator.take_job
    monkeypatch.setattr(
        service._engine._evaluator, "take_job", lambda *given: taken.append(1) or take_job(*given)
    )
    answer(service.compute_loss, request)
    assert taken


def test_types_and_shapes_are_checked_once_for_all_requests_of_a_form(service, monkeypatch):
    forms, checked, check = Forms(pb.ComputeLossRequest), [], FocalLoss.check
    monkeypatch.setattr(FocalLoss, "check", lambda loss, given: checked.append(given) or check(loss, given))
    case = CASES["focal-grid"]
    for seed in range(5):
        request = loss_request(case.config, [case.arrays(np.random.default_rng(seed), 3)])
        answer(service.compute_loss, forms.read(request.SerializeToString()))
    assert len(checked) == 2  # of the first, which made no form known, and of the second
