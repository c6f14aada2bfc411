"""What comes back from a device: numbers and tensors in their order, as they were."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lossd_server.engine.outcome import Launched, read
from lossd_server.engine.transfer import to_device, to_host
from lossd_server.engine.work import LossItem
from lossd_server.losses import Component, Evaluation, EvaluationOptions
from lossd_server.losses.evaluation import FiniteCheck

FLOATS = st.floats(allow_nan=False, width=32)
ROWS = st.lists(FLOATS, max_size=4)
NUMBERS = st.one_of(
    FLOATS,
    ROWS.map(lambda row: np.array(row, np.float64)),
    ROWS.map(lambda row: torch.tensor(row, dtype=torch.float32)),
    FLOATS.map(lambda number: torch.tensor(number, dtype=torch.float64)),
)


@given(st.lists(NUMBERS, max_size=6), st.integers(0, 3))
def test_numbers_come_back_in_their_order_whatever_they_are(numbers, tensor_count):
    tensors = [torch.full((n, 2), float(n)) for n in range(tensor_count)]
    rows, arrays = to_host(numbers, tensors)
    assert [row.tolist() for row in rows] == [np.ravel(np.asarray(n, np.float64)).tolist() for n in numbers]
    assert {row.dtype for row in rows} <= {np.dtype(np.float64)}
    assert [array.tolist() for array in arrays] == [tensor.tolist() for tensor in tensors]


def test_bfloat16_comes_back_as_such():
    _, (array,) = to_host([], [torch.tensor([1.5, -2.0], dtype=torch.bfloat16)])
    assert array.dtype == ml_dtypes.bfloat16
    assert array.tolist() == [1.5, -2.0]


def launched(number, *, is_finite=True):
    """An evaluation as on a GPU, where numbers are tensors."""
    value = torch.tensor(number, dtype=torch.float64)
    inputs = torch.tensor([number, 0.0 if is_finite else torch.inf])
    return Launched(
        item=LossItem(path="", arguments={}, options=EvaluationOptions(gradients=("inputs",))),
        evaluation=Evaluation(
            loss=value.float(),
            components=(Component(name="part", value=value * 2, weight=1.0),),
            gradients={"inputs": [inputs, inputs + 1]},
            raw_sums={"positive_count": torch.stack([value, value + 1])},
            negative_side_count=torch.tensor(3.0, dtype=torch.float64),
        ),
        check=FiniteCheck.begin({"inputs": inputs}),
    )


def test_several_evaluations_are_read_at_once_and_each_has_its_own():
    some = [launched(1.0), launched(2.0, is_finite=False), launched(3.0)]
    for number, each, (rows, arrays) in zip((1.0, 2.0, 3.0), some, read(some), strict=True):
        outcome = each.outcome(rows, arrays, strict=False)
        assert float(outcome.loss) == number
        assert outcome.components == [("part", number * 2, 1.0)]
        assert [array.tolist()[0] for array in outcome.gradients["inputs"]] == [number, number + 1]
        assert outcome.raw_sums == [{"positive_count": number}, {"positive_count": number + 1}]
        assert outcome.negative_side_count == 3
        assert [found.first_index for found in outcome.non_finite] == ([(1,)] if number == 2 else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@given(
    st.lists(
        hnp.arrays(
            st.sampled_from([np.int8, np.int64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16]),
            hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
            elements=st.integers(0, 100),
        ),
        max_size=6,
    )
)
def test_what_goes_to_a_gpu_comes_back_as_it_was(arrays):
    large = np.arange(1 << 17, dtype=np.float32)
    given_, device = {"few": [*arrays, large], "number": 3}, torch.device("cuda", 0)
    moved = to_device(given_, device)
    assert moved["number"] == 3
    assert all(tensor.is_cuda for tensor in moved["few"])
    _, found = to_host([], moved["few"])
    for array, back in zip(given_["few"], found, strict=True):
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
