"""Arrays that go up together come out as they were."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lossd_server.losses.uploads import uploaded

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]

ARRAYS = st.lists(
    hnp.arrays(
        st.sampled_from([np.bool_, np.int8, np.int32, np.int64, np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
    ),
    max_size=6,
)


@pytest.mark.parametrize("device", DEVICES)
@given(arrays=ARRAYS)
def test_every_array_comes_out_as_it_was(device, arrays):
    tensors = uploaded(arrays, torch.device(device))
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.device.type == device
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
        assert tensor.cpu().numpy().dtype == array.dtype


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device):
    whole = np.arange(24, dtype=np.int64).reshape(4, 6)
    cut, turned = whole[:, 1:4], whole.T
    found = uploaded([cut, turned], torch.device(device))
    assert [tensor.tolist() for tensor in found] == [cut.tolist(), turned.tolist()]
