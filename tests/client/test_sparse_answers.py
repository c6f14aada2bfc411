"""Sparse answers: nobody sees that they were, and one that makes no sense is a fault of the server."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager

import grpc
import numpy as np
import pytest
import torch

from lossd.tensors import pack
from lossd.v1 import loss_service_pb2 as pb
from lossd_client import AsyncClient, Client, FCOSAssigner, FCOSLoss, ServerError, _storage
from lossd_server.losses import EvaluationOptions
from lossd_server.losses import FCOSLoss as LocalLoss
from lossd_server.targets import FCOSAssigner as LocalAssigner
from tests.client.support import FCOS, same_bits
from tests.service.support import fcos_truth_arrays, make_server, scene

PREDICTIONS = FCOSLoss.differentiable
ONE = {"boxes": np.array([[20, 20, 50, 50]], np.float32), "labels": np.array([1])}
NONE = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
CROWD = {**ONE, "iscrowd": np.array([True])}
TINY_CROWD = {
    "boxes": np.array([[1, 1, 2, 2]], np.float32),
    "labels": np.array([0]),
    "iscrowd": np.array([1]),
}


class _Forwarding(grpc.GenericRpcHandler):
    """Passes calls on to a server, and its answers back after a change."""

    def __init__(self, channel, change):
        self._channel = channel
        self._change = change

    def service(self, details):
        method = details.method
        if not method.endswith("Stream"):
            return grpc.unary_unary_rpc_method_handler(lambda data, _call: self._answer(method, data))
        return grpc.stream_stream_rpc_method_handler(lambda requests, _call: self._answers(method, requests))

    def _answer(self, method, data):
        answer = self._channel.unary_unary(method)(data)
        if method.endswith("GetServerInfo"):
            return answer
        kind = getattr(pb, f"{method.rpartition('/')[2]}Response")
        return self._changed(kind.FromString(answer), lambda message: message.results)

    def _answers(self, method, requests):
        kind = getattr(pb, f"{method.rpartition('/')[2]}Response")
        for answer in self._channel.stream_stream(method)(requests):
            yield self._changed(kind.FromString(answer), lambda message: message.response.results)

    def _changed(self, message, results_of):
        for result in results_of(message):
            self._change(result)
        return message.SerializeToString()


@contextmanager
def forwarding(target, change):
    """The address of a server whose answers are changed on their way."""
    server = grpc.server(ThreadPoolExecutor(2))
    with grpc.insecure_channel(target) as channel:
        server.add_generic_rpc_handlers((_Forwarding(channel, change),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def gradients_sparse_in(results):
    return [gradient.input for result in results for gradient in result.gradients if gradient.sparse]


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("gradient_dtype", [None, np.float64])
def test_gradients_look_as_if_they_came_dense(target, preset, dtype, gradient_dtype):
    arrays = {**fcos_truth_arrays(np.random.default_rng(0), 2), "ground_truth": [ONE, NONE]}
    *preds, truth = arrays.values()
    preds = [[level.astype(dtype) for level in levels] for levels in preds]
    loss, answers = FCOSLoss(num_classes=3, preset=preset), []
    settings = {"gradients": True, "gradient_dtype": gradient_dtype}
    with forwarding(target, answers.append) as address, Client(address) as client:
        result = client.compute_loss(loss, *preds, truth, **settings)
        (streamed,) = client.compute_loss_stream(loss, [(*preds, truth)], **settings)
    assert gradients_sparse_in(answers) == [*PREDICTIONS[preset == "documented" :]] * 2
    expected = local_gradients(preset, preds, truth)
    for name, levels in expected.items():
        for found, other, want in zip(result.gradients[name], streamed.gradients[name], levels, strict=True):
            assert not found.flags.writeable
            assert same_bits(found, other)
            if gradient_dtype is None:
                assert same_bits(found, want)
            else:
                assert found.dtype == gradient_dtype


def local_gradients(preset, preds, truth):
    loss = LocalLoss(3, preset=preset)
    arguments = dict(zip(PREDICTIONS, ([*map(torch.from_numpy, levels)] for levels in preds), strict=True))
    with torch.no_grad():
        prepared = loss.prepare({**arguments, "ground_truth": truth})
        found = loss.evaluate(prepared, EvaluationOptions(gradients=PREDICTIONS)).gradients
    return {name: [level.numpy() for level in levels] for name, levels in found.items()}


def test_gradients_in_shared_memory_stay_there(tmp_path, monkeypatch):
    monkeypatch.setattr(_storage, "LEAST_BYTES", 1)
    case, answers = FCOS["fcos-truth-autotimm"], []
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",)) as server,
        Client(server.addresses[0]) as shared,
        Client(server.addresses[0], shared_memory=False) as inline,
    ):
        monkeypatch.setattr(_storage.Storage, "read", _noting(_storage.Storage.read, answers))
        found = shared.compute_loss(case.config, *case.arguments(), gradients=True)
        assert {tensor.WhichOneof("storage") for tensor in answers} == {"shared"}
        expected = inline.compute_loss(case.config, *case.arguments(), gradients=True)
        for name in PREDICTIONS:
            assert all(map(same_bits, found.gradients[name], expected.gradients[name]))


def _noting(read, tensors):
    def noted(self, tensor, payloads):
        tensors.append(tensor)
        return read(self, tensor, payloads)

    return noted


IMAGES = [[ONE], [ONE, NONE], [NONE], [CROWD, ONE], [TINY_CROWD], [{**ONE, "iscrowd": [0]}], []]


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("size", [(64, 96), (128, 100), (0, 0)])
def test_dense_targets_look_as_if_they_came_dense(target, images, size):
    local = LocalAssigner()
    expected = local.assign(images, local.feature_sizes(size))
    forms = []
    change = lambda result: forms.append(result.WhichOneof("targets"))  # noqa: E731
    with forwarding(target, change) as address, Client(address) as client:
        found = [client.assign_targets(FCOSAssigner(), images, image_size=size)]
        found += client.assign_targets_stream(FCOSAssigner(), [images], image_size=size)
        found += asyncio.run(_assigned(address, images, size))
    assert set(forms) == {"sparse" if images and size[0] else "dense"}
    for targets in found:
        assert targets.positive_counts == tuple(expected.positive_counts())
        for level, want in zip(targets.levels, expected.dense(), strict=True):
            for name in ("cls", "reg", "centerness", "ignored"):
                value, other = getattr(level, name), getattr(want, name)
                assert (value is None) == (other is None)
                assert other is None or (same_bits(value, other) and not value.flags.writeable)


async def _assigned(address, images, size):
    async with AsyncClient(address) as client:
        found = [await client.assign_targets(FCOSAssigner(), images, image_size=size)]
        stream = client.assign_targets_stream(FCOSAssigner(), [images], image_size=size)
        async with aclosing(stream) as answers:
            return found + [answer async for answer in answers]


def test_crowded_images_get_the_targets_that_come_dense(client):
    rng = np.random.default_rng(0)
    images = [scene(rng, (64, 64), n=60) for _ in range(2)]
    local = LocalAssigner()
    expected = local.assign(images, local.feature_sizes((64, 64))).dense()
    found = client.assign_targets(FCOSAssigner(), images, image_size=(64, 64)).levels
    for level, want in zip(found, expected, strict=True):
        assert same_bits(level.reg, want.reg)


def ints(*values):
    return pack(np.array(values, np.int32))


def reshaped(tensor, *shape):
    del tensor.shape[:]
    tensor.shape.extend(shape)


BAD_GRADIENTS = {
    "out of range": (lambda sparse: sparse.places.CopyFrom(ints(*_count(sparse, 10**6))), "places are"),
    "negative": (lambda sparse: sparse.places.CopyFrom(ints(*_count(sparse, -1, start=0))), "places are -1"),
    "unsorted": (lambda sparse: sparse.places.CopyFrom(ints(*_count(sparse)[::-1])), "places are"),
    "too few rows": (lambda sparse: sparse.values.CopyFrom(pack(np.zeros((1, 4)))), "values are [1, 4]"),
    "no rows": (lambda sparse: sparse.ClearField("values"), "dtype is 0"),
    "another shape": (lambda sparse: sparse.shape.append(1), "shape is"),
    "huge": (lambda sparse: sparse.shape.__setitem__(0, 2**40), "shape is"),
    "wrong length": (lambda sparse: reshaped(sparse.values, 99, 4), "storage is"),
}


def _count(sparse, extra=None, start=None):
    places = list(range(sparse.places.shape[0]))
    if extra is not None:
        places[-1 if start is None else start] = extra
    return places


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_a_gradient_that_makes_no_sense_is_a_fault_of_the_server(target, bad):
    change, message = BAD_GRADIENTS[bad]

    def spoil(result):
        change(result.gradients[1].sparse[0])

    arrays = {**fcos_truth_arrays(np.random.default_rng(0), 1), "ground_truth": [ONE]}
    arguments = list(arrays.values())
    loss = FCOSLoss(num_classes=3)
    with forwarding(target, spoil) as address, Client(address) as client:
        with pytest.raises(ServerError) as caught:
            client.compute_loss(loss, *arguments, gradients=True)
        assert caught.value.code is grpc.StatusCode.INTERNAL
        assert "the server's answer is no ComputeLossResponse: " in caught.value.message
        assert message in caught.value.message
        with pytest.raises(ServerError):
            list(client.compute_loss_stream(loss, [arguments], gradients=True))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_gradient_with_levels_missing(target, count):
    def spoil(result):
        del result.gradients[1].sparse[:]
        result.gradients[1].sparse.extend([pb.SparseTensor()] * count)

    arrays = {**fcos_truth_arrays(np.random.default_rng(0), 1), "ground_truth": [ONE]}
    with forwarding(target, spoil) as address, Client(address) as client, pytest.raises(ServerError):
        client.compute_loss(FCOSLoss(num_classes=3), *arrays.values(), gradients=True)


def test_a_head_has_one_loss(target):
    arrays = {**fcos_truth_arrays(np.random.default_rng(0), 1), "ground_truth": [ONE]}
    losses = pack(np.zeros(2, np.float32))
    with (
        forwarding(target, lambda result: result.loss.CopyFrom(losses)) as address,
        Client(address) as client,
        pytest.raises(ServerError, match=r"has shape \[2\], want \[\]"),
    ):
        client.compute_loss(FCOSLoss(num_classes=3), *arrays.values())


def _spoiled_locations(places):
    def change(sparse):
        count = sparse.locations.shape[0]
        rows = np.tile(np.array(places, np.int32), (count, 1))
        sparse.locations.CopyFrom(pack(rows))

    return change


BAD_TARGETS = {
    "image": (_spoiled_locations([1, 0, 0, 0]), "which is outside the pyramid"),
    "level": (_spoiled_locations([0, 5, 0, 0]), "on levels 5 to 5, want 0..4"),
    "negative level": (_spoiled_locations([0, -1, 0, 0]), "on levels -1 to -1"),
    "row": (_spoiled_locations([0, 0, 8, 0]), "locations[0] is [0, 0, 8, 0], which is outside"),
    "negative row": (_spoiled_locations([0, 0, -1, 0]), "outside the pyramid"),
    "column": (_spoiled_locations([0, 0, 0, 12]), "outside the pyramid"),
    "order": (_spoiled_locations([0, 0, 0, 0]), "locations are not in order"),
    "floats": (lambda s: s.locations.CopyFrom(pack(np.zeros(s.locations.shape))), "locations are float64"),
    "labels": (lambda s: s.labels.CopyFrom(ints(1)), "labels are [1]"),
    "distances": (lambda s: s.ltrb.CopyFrom(pack(np.zeros((2, 3), np.float32))), "ltrb are [2, 3]"),
    "centerness": (lambda s: s.centerness.CopyFrom(pack(np.zeros(0, np.float32))), "centerness are [0]"),
    "ignored": (lambda s: s.ignored.CopyFrom(pack(np.full((1, 4), 99, np.int32))), "ignored are on levels"),
    "ignored shape": (lambda s: s.ignored.CopyFrom(ints(1, 2)), "ignored are int32 [2]"),
    "nothing": (lambda s: s.Clear(), "dtype is 0"),
}


@pytest.mark.parametrize("bad", BAD_TARGETS)
def test_targets_that_make_no_sense_are_a_fault_of_the_server(target, bad):
    change, message = BAD_TARGETS[bad]
    with forwarding(target, lambda result: change(result.sparse)) as address, Client(address) as client:
        with pytest.raises(ServerError) as caught:
            client.assign_targets(FCOSAssigner(), [ONE], image_size=(64, 96))
        assert message in caught.value.message
        with pytest.raises(ServerError):
            list(client.assign_targets_stream(FCOSAssigner(), [[ONE]], image_size=(64, 96)))


def test_sizes_that_make_no_sense_are_a_fault_of_the_server(target):
    def spoil(result):
        result.feature_sizes[0].height = -1

    with (
        forwarding(target, spoil) as address,
        Client(address) as client,
        pytest.raises(ServerError, match="feature sizes are"),
    ):
        client.assign_targets(FCOSAssigner(), [NONE], image_size=(64, 96))
