"""The metrics endpoint: the standard names, the project's own, and no label that a caller can choose."""

import grpc
import numpy as np

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from tests.service import custom_modules
from tests.service.metrics import eventually, samples, scrape, value
from tests.service.support import (
    connect,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
)

SERVICE = "lossd.v1.LossService"


def test_grpc_metrics(fresh):
    with connect(fresh) as stub:
        stub.ComputeLoss(good_loss_request())
        stub.AssignTargets(good_assign_request())
        bad = good_loss_request()
        bad.ClearField("items")
        refusal(stub.ComputeLoss, bad)
    method = {"grpc_type": "unary", "grpc_service": SERVICE, "grpc_method": "ComputeLoss"}
    handled = "grpc_server_handled_total"
    eventually(lambda: value(fresh, handled, **method) == 2)
    assert value(fresh, "grpc_server_started_total", **method) == 2
    assert value(fresh, handled, **method, grpc_code="OK") == 1
    assert value(fresh, handled, **method, grpc_code="INVALID_ARGUMENT") == 1
    assert value(fresh, "grpc_server_msg_received_total", **method) == 2
    assert value(fresh, "grpc_server_msg_sent_total", **method) == 1
    assert value(fresh, "grpc_server_handling_seconds_count", **method) == 2
    buckets = [
        float(labels["le"])
        for name, labels, _ in samples(fresh)
        if name == "grpc_server_handling_seconds_bucket" and labels.items() >= method.items()
    ]
    assert min(buckets) < 1e-3
    assert value(fresh, handled, **{**method, "grpc_method": "AssignTargets"}) == 1
    assert 'grpc_server_handling_seconds_bucket{grpc_method="ComputeLoss"' in scrape(fresh)


def test_grpc_metrics_of_a_stream(fresh):
    with connect(fresh) as stub:
        envelopes = [pb.ComputeLossStreamRequest(request=good_loss_request())] * 3
        assert len(list(stub.ComputeLossStream(iter(envelopes)))) == 3
    labels = {"grpc_type": "bidi_stream", "grpc_service": SERVICE, "grpc_method": "ComputeLossStream"}
    eventually(lambda: value(fresh, "grpc_server_handled_total", **labels, grpc_code="OK") == 1)
    assert value(fresh, "grpc_server_msg_received_total", **labels) == 3
    assert value(fresh, "grpc_server_msg_sent_total", **labels) == 3


def test_lossd_metrics(fresh):
    good = good_loss_request()
    batch = loss_request(losses_pb2.FocalLoss(), [])
    batch.items.extend([good.items[0]] * 3)
    stray = good_loss_request()
    stray.items[0].focal.inputs.inline = np.full((3, 5), np.nan, np.float32).tobytes()
    with connect(fresh) as stub:
        positives = sum(r.positive_count for q in (batch, stray) for r in stub.ComputeLoss(q).results)
        (targets,) = stub.AssignTargets(good_assign_request()).results
    for stage in ("decode", "queue", "compute", "encode"):
        eventually(
            lambda stage=stage: (
                value(fresh, "lossd_stage_seconds_count", method="ComputeLoss", stage=stage) == 2
            )
        )
    assert value(fresh, "lossd_batch_items_sum", method="ComputeLoss") == 4
    assert value(fresh, "lossd_batch_items_count", method="AssignTargets") == 1
    assert (
        value(fresh, "lossd_request_bytes_sum", method="ComputeLoss") == batch.ByteSize() + stray.ByteSize()
    )
    assert value(fresh, "lossd_response_bytes_count", method="ComputeLoss") == 2
    assert value(fresh, "lossd_in_flight", method="ComputeLoss") == 0
    assert value(fresh, "lossd_positives_total", method="ComputeLoss") == positives
    assert value(fresh, "lossd_positives_total", method="AssignTargets") == sum(targets.positive_counts)
    assert value(fresh, "lossd_non_finite_inputs_total") == 1
    assert value(fresh, "lossd_build_info") == 1


def test_in_flight_and_refusals_by_reason(fresh, held):
    with connect(fresh) as stub:
        call = held(stub)
        assert value(fresh, "lossd_in_flight", method="ComputeLoss") == 1
        custom_modules.release.set()
        call.result(30)
        no_items, no_loss = good_loss_request(), good_loss_request()
        no_items.items[0].focal.inputs.dtype = 99
        no_loss.ClearField("focal")
        for bad in (no_items, no_loss, no_loss):
            refusal(stub.ComputeLoss, bad)
    refusals = "lossd_refusals_total"
    eventually(lambda: value(fresh, refusals, method="ComputeLoss", reason="MISSING_FIELD") == 2)
    assert value(fresh, refusals, method="ComputeLoss", reason="INVALID_DTYPE") == 1
    eventually(lambda: value(fresh, "lossd_in_flight", method="ComputeLoss") == 0)


def test_no_label_takes_what_a_caller_chooses(fresh):
    paths = (
        "/foo.Mine/Bar",
        f"/{SERVICE}/Mine",
        "/Mine",
        "/a/b/Mine",
        "//Mine",
        "/grpc.health.v1.Health/Mine",
    )
    with connect(fresh) as stub, grpc.insecure_channel(fresh.addresses[0]) as channel:
        for path in paths:
            found = refusal(channel.unary_unary(path), b"")
            assert found.code is grpc.StatusCode.UNIMPLEMENTED
        bad = loss_request(losses_pb2.CustomLoss(name="Mine"), [])
        bad.items.add()
        assert refusal(stub.ComputeLoss, bad).reason == "UNKNOWN_CUSTOM_LOSS"
        metadata = [("mine", "Mine"), ("user-agent", "Mine")]
        stub.ComputeLoss(good_loss_request(), metadata=metadata)
    eventually(lambda: value(fresh, "lossd_refusals_total", reason="UNKNOWN_CUSTOM_LOSS") == 1)
    assert "mine" not in scrape(fresh).lower()


def test_no_metrics_when_none_are_wanted():
    with make_server(metrics_port=None) as server:
        assert server.metrics_port is None
