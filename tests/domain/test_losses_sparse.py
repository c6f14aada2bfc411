"""Where the gradients of an FCOS loss can be other than zero."""

import numpy as np
import pytest
import torch

from lossd_server.losses import EvaluationOptions, FCOSLoss
from tests.service.support import CLASSES, fcos_dense_arrays, fcos_truth_arrays, to_torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def evaluated(loss, arrays, dtype, **options):
    arguments = {
        name: [level.to(dtype) for level in to_torch(value)] if name.endswith("preds") else to_torch(value)
        for name, value in arrays.items()
    }
    with torch.no_grad():
        return loss.evaluate(
            loss.prepare(arguments), EvaluationOptions(gradients=loss.differentiable, **options)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("make", [fcos_dense_arrays, fcos_truth_arrays])
def test_elsewhere_every_bit_is_zero(make, preset, dtype):
    arrays = make(np.random.default_rng(3), 2)
    found = evaluated(FCOSLoss(CLASSES, preset=preset), arrays, dtype, nonzero_rows=True)
    expected = {"reg_preds", "centerness_preds"} | ({"cls_preds"} if preset == "autotimm" else set())
    assert found.nonzero_rows.keys() == expected
    for name, levels in found.nonzero_rows.items():
        for gradient, places in zip(found.gradients[name], levels, strict=True):
            rows = gradient.movedim(1, -1).reshape(-1, gradient.shape[1]).contiguous()
            assert (np.diff(places) > 0).all()
            assert rows[places].any() or not len(places)
            rows[places] = 0
            assert not rows.flatten().view(torch.uint8).any()
    assert sum(map(len, found.nonzero_rows["reg_preds"])) == found.raw_sums["positive_count"].sum() > 0


def test_nothing_is_said_unless_asked():
    arrays = fcos_truth_arrays(np.random.default_rng(3), 1)
    assert evaluated(FCOSLoss(CLASSES), arrays, torch.float32).nonzero_rows == {}


def test_images_without_objects_have_no_such_rows():
    arrays = fcos_truth_arrays(np.random.default_rng(3), 2)
    empty = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
    found = evaluated(
        FCOSLoss(CLASSES), {**arrays, "ground_truth": [empty, empty]}, torch.float32, nonzero_rows=True
    )
    assert [len(places) for places in found.nonzero_rows["reg_preds"]] == [0, 0]
