"""A few bytes that ask for an answer of gigabytes are refused before it takes any memory."""

import grpc
import numpy as np
import pytest

from lossd.headers import REQUEST_BYTES
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from tests.service.metrics import eventually
from tests.service.support import connect, good_assign_request, make_server, objects, refusal
from tests.service.test_admission import path_of, withheld

LIMIT = 1 << 20
POSITIVE_BYTES = 48


@pytest.fixture(scope="module")
def stub():
    with make_server(max_message_bytes=LIMIT) as server, connect(server) as made:
        yield made


def whole_image(*sides, form, crowd=False):
    """Square levels of stride 1, an item each, and a box that all of their locations lie in."""
    assigner = losses_pb2.FCOSAssigner(
        strides=[1], regress_ranges=[losses_pb2.RegressRange(min=-1, max=float("inf"))]
    )
    image = {"boxes": np.array([[0, 0, max(sides), max(sides)]], np.float32), "labels": np.array([0])}
    if crowd:
        image["iscrowd"] = np.array([True])
    items = [
        pb.AssignItem(ground_truth=[objects(image)], feature_sizes=[pb.Size(height=side, width=side)])
        for side in sides
    ]
    return pb.AssignTargetsRequest(assigner=assigner, items=items, format=form)


def refused(stub, request):
    found = refusal(stub.AssignTargets, request)
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert len(stub.AssignTargets(good_assign_request()).results) == 1
    return found.metadata


def test_as_many_positives_as_fit_are_answered(stub):
    (result,) = stub.AssignTargets(whole_image(140, form=pb.TARGET_FORMAT_SPARSE)).results
    assert result.positive_counts == [140 * 140]


@pytest.mark.parametrize("form", [pb.TARGET_FORMAT_SPARSE, pb.TARGET_FORMAT_SMALLER])
def test_more_positives_than_fit_are_refused(stub, form):
    found = refused(stub, whole_image(400, form=form))
    assert found == {
        "field": "items[0].ground_truth",
        "value": str(400 * 400),
        "limit": str(LIMIT // POSITIVE_BYTES),
    }


def test_positives_of_all_items_count(stub):
    assert refused(stub, whole_image(130, 130, form=pb.TARGET_FORMAT_SPARSE)) == {
        "field": "items[1].ground_truth",
        "value": str(130 * 130),
        "limit": str(LIMIT // POSITIVE_BYTES - 130 * 130),
    }


def test_the_smaller_form_may_be_the_dense_one(stub):
    (result,) = stub.AssignTargets(whole_image(180, form=pb.TARGET_FORMAT_SMALLER)).results
    assert result.WhichOneof("targets") == "dense"
    assert result.positive_counts == [180 * 180]


def test_locations_beside_a_crowd_region_count_as_if_all_were_answered(stub):
    assert refused(stub, whole_image(400, form=pb.TARGET_FORMAT_SPARSE, crowd=True))["field"] == "items"


@pytest.mark.parametrize("form", [pb.TARGET_FORMAT_DENSE, pb.TARGET_FORMAT_SPARSE])
def test_answers_count_among_the_bytes_in_flight(form):
    with (
        make_server(max_message_bytes=LIMIT, max_in_flight_bytes=LIMIT) as server,
        withheld(server) as calls,
        connect(server) as stub,
    ):
        large = whole_image(140, form=form)
        assert len(stub.AssignTargets(large).results) == 1
        eventually(lambda: server._admission.bytes == 0)
        calls.call(path_of("ComputeLoss"), **{REQUEST_BYTES: str(LIMIT // 2)})
        eventually(lambda: server._admission.bytes == LIMIT // 2)
        found = refusal(stub.AssignTargets, large)
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert found.retry_seconds > 0
        assert len(stub.AssignTargets(whole_image(9, form=form)).results) == 1
