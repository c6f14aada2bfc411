"""The synchronous client: the surface that the README shows, inputs of every form, splitting."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import LARGE_BYTES, Parcel
from lossd.writing import message_field, placed, tags_of
from lossd_client import (
    CenternessLoss,
    Client,
    CustomLoss,
    FCOSAssigner,
    FCOSLoss,
    FocalLoss,
    GIoULoss,
    InvalidInputError,
    TooLargeError,
)
from lossd_client._storage import Storage
from lossd_server.targets import FCOSAssigner as LocalAssigner
from tests.client.support import FCOS, SIMPLE, counting_client, same_bits
from tests.service.support import boxes, fcos_dense_arrays, fcos_truth_arrays, focal_arrays, scene

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def focal(rng, n=4):
    arrays = focal_arrays(rng, n)
    return arrays["inputs"], arrays["targets"]


def test_surface_of_the_simple_losses(client, rng):
    logits, targets = focal(rng)
    result = client.compute_loss(FocalLoss(alpha=0.25, gamma=2.0), logits, targets, gradients=True)
    assert result.loss.shape == ()
    assert result.loss.dtype == np.float32
    assert result.gradients.keys() == {"inputs"}
    assert result.gradients["inputs"].shape == logits.shape
    assert result.gradients["inputs"].dtype == logits.dtype
    assert result.positive_count == (targets >= 0).sum()
    assert result.raw_sums["cls_loss"] / result.raw_sums["valid_count"] == pytest.approx(float(result.loss))
    assert result.preset == "autotimm"
    assert result.timings["compute"] > 0
    assert result.kept_rows is None
    assert result.non_finite == ()
    pairs = [(logits, targets), focal(rng, 7)]
    results = client.compute_losses(FocalLoss(reduction="none"), pairs)
    assert [len(r.loss) for r in results] == [len(r.kept_rows) for r in results]
    assert client.compute_loss(GIoULoss(), boxes(rng, 3), boxes(rng, 3)).gradients == {}
    assert client.compute_loss(CenternessLoss(), np.zeros(3), np.ones(3), np.ones(3)).loss > 0


def test_surface_of_the_fcos_loss(client, rng):
    six = list(fcos_dense_arrays(rng, 2).values())
    result = client.compute_loss(FCOSLoss(num_classes=3), *six, gradients=True)
    assert result.preset == "autotimm"
    assert result.gradients.keys() == {"cls_preds", "reg_preds", "centerness_preds"}
    assert [g.shape for g in result.gradients["reg_preds"]] == [level.shape for level in six[1]]
    four = list(fcos_truth_arrays(rng, 2).values())
    result = client.compute_loss(FCOSLoss(num_classes=3), *four)
    assert result.preset == "documented"
    terms = [result.components[name] for name in ("cls_loss", "reg_loss", "centerness_loss")]
    assert result.components["total_loss"] == pytest.approx(sum(terms))
    assert result.components["total_loss"] == result.components["loss"] == float(result.loss)
    assert result.positive_count == sum(level["positive_count"] for level in result.level_sums) > 0
    assert result.component_weights["centerness_floor"] == 0


def test_surface_of_the_assigner(client, rng):
    ground_truth = [scene(rng, (128, 160)) for _ in range(2)]
    dense = client.assign_targets(FCOSAssigner(), ground_truth, image_size=(128, 160))
    assigner = LocalAssigner()
    sizes = assigner.feature_sizes((128, 160))
    expected = assigner.assign(ground_truth, sizes)
    for level, want in zip(dense.levels, expected.dense(), strict=True):
        assert same_bits(level.cls, want.cls)
        assert same_bits(level.reg, want.reg)
        assert same_bits(level.centerness, want.centerness)
        assert level.ignored is None
    assert dense.feature_sizes == tuple(sizes)
    assert dense.positive_counts == tuple(expected.positive_counts())
    assert dense.preset == "autotimm"
    sparse = client.assign_targets(FCOSAssigner(), ground_truth, feature_sizes=sizes, sparse=True)
    for name in ("locations", "labels", "ltrb", "centerness", "matched", "ignored"):
        assert same_bits(getattr(sparse, name), getattr(expected.sparse(), name))
    own = FCOSAssigner(strides=(4,), regress_ranges=[(-1, float("inf"))], box_format="cxcywh")
    assert client.assign_targets(own, ground_truth, image_size=(64, 64)).feature_sizes == ((16, 16),)


def test_dense_targets_of_the_assigner_feed_the_loss(client, rng):
    truth = fcos_truth_arrays(rng, 2)
    assigner = FCOSAssigner(strides=(8, 16), regress_ranges=((-1, 64), (64, 128)))
    sizes = [pred.shape[2:] for pred in truth["cls_preds"]]
    levels = client.assign_targets(assigner, truth["ground_truth"], feature_sizes=sizes).levels
    preds = list(truth.values())[:3]
    lists = [[getattr(level, name) for level in levels] for name in ("cls", "reg", "centerness")]
    loss = FCOSLoss(num_classes=3, preset="autotimm")
    by_targets = client.compute_loss(loss, *preds, *lists)
    by_truth = client.compute_loss(loss, *preds, truth["ground_truth"])
    assert by_targets.components == by_truth.components


def test_server_info(client):
    info = client.server_info()
    assert info.losses == ("focal", "giou", "centerness", "fcos", "custom")
    assert info.custom_losses["Squared"] == ("pred", "target", "scale")
    assert info.loss_presets == ("autotimm", "documented")
    assert info.assigner_presets == ("autotimm",)
    assert info.max_message_bytes == 256 << 20


@pytest.mark.parametrize("case", [*SIMPLE.values(), *FCOS.values()], ids=[*SIMPLE, *FCOS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16], ids=str)
def test_gradients_have_type_and_shape_of_their_inputs(client, case, dtype):
    def cast(value):
        if isinstance(value, list):
            return [cast(entry) for entry in value]
        floating = isinstance(value, np.ndarray) and value.dtype == np.float32
        return value.astype(dtype) if floating else value

    arguments = [cast(value) for value in case.arguments()]
    result = client.compute_loss(case.config, *arguments, gradients=True)
    assert result.loss.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert tuple(result.gradients) == case.config.differentiable
    for name, value in zip(case.names, arguments, strict=True):
        if name in result.gradients:
            gradient = result.gradients[name]
            pairs = zip(gradient, value, strict=True) if isinstance(value, list) else [(gradient, value)]
            assert all((g.dtype, g.shape) == (v.dtype, v.shape) for g, v in pairs)


def reversed_view(array):
    return np.ascontiguousarray(array[::-1])[::-1]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS = {
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "fortran": np.asfortranarray,
    "reversed": reversed_view,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "read-only": read_only,
    "list": lambda a: a.astype(np.float64).tolist() if a.dtype.kind == "f" else a.tolist(),
    "torch": torch.from_numpy,
    "torch-transposed": lambda a: torch.from_numpy(a.T.copy()).permute(*reversed(range(a.ndim))),
    "array-interface": lambda a: type("Held", (), {"__array__": lambda _, *__, **___: a})(),
    "dlpack": lambda a: type(
        "Lent", (), {"__dlpack__": lambda _, **k: a.__dlpack__(**k), "__dlpack_device__": lambda _: (1, 0)}
    )(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=str)
def test_inputs_of_every_form_mean_the_same(client, rng, form, dtype):
    logits, labels = focal(rng)
    logits = logits.astype(dtype)
    expected = client.compute_loss(FocalLoss(), logits, labels, gradients=True)
    result = client.compute_loss(FocalLoss(), form(logits), form(labels), gradients=True)
    if form is FORMS["list"]:  # numpy makes float64 of a list
        expected = client.compute_loss(FocalLoss(), logits.astype(np.float64), labels, gradients=True)
    assert same_bits(result.loss, expected.loss)
    assert same_bits(result.gradients["inputs"], expected.gradients["inputs"])


def test_0d_and_empty(client):
    result = client.compute_loss(CenternessLoss(), 0.0, 1.0, gradients=True)
    assert float(result.loss) == pytest.approx(np.log(2))
    assert result.gradients["pred"].shape == ()
    assert float(result.gradients["pred"]) == -0.5
    empty = client.compute_loss(GIoULoss(), np.zeros((0, 4)), np.zeros((0, 4)), gradients=True)
    assert float(empty.loss) == 0
    assert empty.gradients["pred_boxes"].shape == (0, 4)
    logits = np.zeros((2, 3, 0, 5), np.float16)
    empty = client.compute_loss(FocalLoss(), logits, np.zeros((2, 0, 5), np.uint8), gradients=True)
    assert float(empty.loss) == 0
    assert same_bits(empty.gradients["inputs"], logits)


def test_objects_as_plain_lists(client):
    images = [{"boxes": [[4.0, 4.0, 40.0, 40.0]], "labels": [2]}, {"boxes": [], "labels": []}]
    found = client.assign_targets(FCOSAssigner(), images, image_size=(64, 64), sparse=True)
    assert set(found.labels.tolist()) == {2}
    assert set(found.locations[:, 0].tolist()) == {0}


def test_sizes_and_strides_are_those_of_the_moment(client):
    """What is asked again is not written again, whatever kind of number it is asked with."""
    image = {"boxes": np.array([[0, 0, 30, 30]], np.float32), "labels": np.array([1])}
    height, strides = torch.tensor(64), [torch.tensor(8), np.array(16)]
    assigner = FCOSAssigner(strides=strides, regress_ranges=np.array([[0, 32], [32, 1e8]]))
    for rows in (64, 96):
        height.fill_(rows)
        for size in ((height, np.int64(64)), [rows, np.array(64)], (rows, 64)):
            found = client.assign_targets(assigner, [image], image_size=size, sparse=True)
            assert found.feature_sizes == ((rows // 8, 8), (rows // 16, 4))
            found = client.assign_targets(
                assigner, [image], feature_sizes=np.array([size, size]), sparse=True
            )
            assert found.feature_sizes == ((rows, 64), (rows, 64))
    strides[0].fill_(4)
    assert client.assign_targets(assigner, [image], image_size=(64, 64)).feature_sizes == ((8, 8), (4, 4))
    for wrong in ((64.0, 64), (64, "64")):
        with pytest.raises(TypeError):
            client.assign_targets(assigner, [image], image_size=wrong)
    with pytest.raises(TypeError):
        FCOSAssigner(strides=(8.0, 16))


def test_settings_of_losses_are_those_of_the_moment(client, rng):
    """What a request says of a loss is not written again, whatever kind of number it was made with."""
    inputs, gamma, strides = focal(rng), torch.tensor(1.0), [8, 16]
    loss = FocalLoss(alpha=np.float32(0.5), gamma=gamma, reduction="sum")
    head = FCOSLoss(
        np.int64(3), cls_weight=torch.tensor(2), strides=strides, regress_ranges=[[-1, 9], [9, 99]]
    )
    before = client.compute_loss(loss, *inputs).loss
    gamma.fill_(3.0)
    strides.append(32)
    assert loss == FocalLoss(0.5, 1, "sum")
    assert client.compute_loss(loss, *inputs).loss == before
    assert client.compute_loss(FocalLoss(0.5, gamma, "sum"), *inputs).loss != before
    assert head == FCOSLoss(3, cls_weight=2.0, strides=(8, 16), regress_ranges=((-1.0, 9.0), (9.0, 99.0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FocalLoss(gamma="2"),
        lambda: GIoULoss(eps="1e-7"),
        lambda: FCOSLoss("3"),
        lambda: FCOSLoss(3.5),
        lambda: FCOSLoss(3, reg_weight="1"),
    ],
)
def test_what_is_no_number_is_none_of_a_loss(make):
    with pytest.raises(TypeError):
        make()


def test_a_large_tensor_of_a_custom_loss_lies_as_its_reader_wants_it():
    array = np.arange(LARGE_BYTES, dtype=np.float32)
    for length in range(1, 5):
        pieces = CustomLoss("Mean").item([{"n" * length: array}], "items[0].custom", Storage(None))
        item = message_field(tags_of(pb.ComputeLossRequest.DESCRIPTOR)["items"], pieces)
        data = b"".join(placed(item))
        parcel = Parcel.read(pb.ComputeLossRequest, data)
        found = unpack(parcel.message.items[0].custom.tensors["n" * length], parcel.payloads)
        assert np.array_equal(found, array)
        assert np.shares_memory(found, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_torch_tensors(client, rng, dtype):
    logits, labels = map(torch.from_numpy, focal(rng))
    logits = logits.to(dtype)
    forms = [
        logits,
        logits.clone().requires_grad_(),
        logits.repeat_interleave(2, 1)[:, ::2],
        logits.T.clone().T,
    ]
    results = [client.compute_loss(FocalLoss(), form, labels, gradients=True) for form in forms]
    assert {r.loss.tobytes() for r in results} == {results[0].loss.tobytes()}
    assert {r.gradients["inputs"].dtype.name for r in results} == {str(dtype).removeprefix("torch.")}


def test_custom_loss(client):
    tensors = {"pred": np.array([1.0, 3.0], np.float32), "target": np.zeros(2, np.float32)}
    assert float(client.compute_loss(CustomLoss("Squared"), tensors).loss) == 5
    named = client.compute_loss(CustomLoss("Named"), {"pred": tensors["pred"]})
    assert (float(named.loss), named.components, named.preset) == (4, {"l2": 10.0}, None)


def test_custom_loss_with_gradients(client):
    tensors = {"pred": np.array([1.0, 3.0], np.float32), "target": np.zeros(2, np.float32)}
    result = client.compute_loss(CustomLoss("Squared"), tensors, gradients=True)
    assert result.gradients["pred"].tolist() == [1.0, 3.0]
    assert result.gradients["target"].tolist() == [-1.0, -3.0]


def test_options_reach_the_server(client, rng):
    logits, labels = focal(rng)
    result = client.compute_loss(
        FocalLoss(), logits, labels, gradients=["inputs"], gradient_dtype="bfloat16", normalizer=9.0
    )
    assert result.gradients["inputs"].dtype == BFLOAT16
    assert float(result.loss) == pytest.approx(result.raw_sums["cls_loss"] / 9)
    logits[1, 2] = np.nan
    found = client.compute_loss(FocalLoss(), logits, labels).non_finite
    assert [(f.input, f.count, f.first_index) for f in found] == [("inputs", 1, (1, 2))]
    with pytest.raises(InvalidInputError, match="NOT_FINITE"):
        client.compute_loss(FocalLoss(), logits, labels, strict=True)


def test_a_normalizer_that_is_a_tensor_is_read_for_every_call(client, rng):
    logits, labels = focal(rng)
    count = torch.tensor(0.0)
    for number in (3.0, 7.0, 4.0):
        count.fill_(number)  # as an all-reduce does
        result = client.compute_loss(FocalLoss(), logits, labels, normalizer=count)
        assert float(result.loss) == pytest.approx(result.raw_sums["cls_loss"] / number)


def test_a_large_batch_is_split(small_target, client, rng):
    items = [focal(rng, n) for n in (9_000, 10, 12_000, 15_000, 9_000, 1, 20_000)]
    normalizers = [None, 3.0, None, 7.0, None, None, 11.0]
    options = {"gradients": True, "gradient_dtype": np.float16, "normalizers": normalizers}
    loss = FocalLoss(alpha=0.0, gamma=0.5)
    expected = client.compute_losses(loss, items, **options)
    with counting_client(small_target) as (small, calls):
        for _ in range(2):
            results = small.compute_losses(loss, items, **options)
    assert calls["ComputeLoss"] >= 4
    assert calls["GetServerInfo"] == 1
    assert len(results) == len(items)
    for result, want in zip(results, expected, strict=True):
        assert same_bits(result.loss, want.loss)
        assert same_bits(result.gradients["inputs"], want.gradients["inputs"])


def test_an_error_in_a_split_batch_names_the_item_of_the_whole(small_target, rng):
    items = [focal(rng, 12_000) for _ in range(6)]
    items[4][1][7] = 5
    with counting_client(small_target) as (small, calls), pytest.raises(InvalidInputError) as caught:
        small.compute_losses(FocalLoss(), items)
    assert calls["ComputeLoss"] > 1
    assert caught.value.field == "items[4].focal.targets"
    assert caught.value.message.startswith("items[4].focal.targets")
    assert caught.value.metadata["position"] == "[7]"


def test_an_item_that_is_too_large_is_not_sent(small_target, rng):
    items = [focal(rng, 10), focal(rng, 10), focal(rng, 60_000)]
    with counting_client(small_target) as (small, calls), pytest.raises(TooLargeError) as caught:
        small.compute_losses(FocalLoss(), items)
    assert calls["ComputeLoss"] == 0
    assert caught.value.field == "items[2]"
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.metadata["limit"] == str(1 << 20)


def test_closing_is_not_the_end(target, rng):
    client = Client(target)
    client.close()
    for _ in range(2):
        assert client.compute_loss(FocalLoss(), *focal(rng)).loss > 0
        client.close()
        client.close()


def test_import_needs_no_torch():
    script = "import lossd_client, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
