"""What holds for all inputs: how far rounding goes, and that sparse targets are the dense ones."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lossd.narrow import narrowed_integers
from lossd_client._errors import InvalidInputError
from lossd_client._maps import DenseForm, dense_targets
from lossd_client._narrow import narrowed
from lossd_client._targets import SparseTargets
from lossd_server.targets import FCOSAssigner

EXAMPLES = settings(max_examples=100, deadline=None)
TYPES = {
    np.dtype(np.float16): (2.0**-11, 2.0**-25),
    np.dtype(ml_dtypes.bfloat16): (2.0**-8, 1e-38),
}
"""The farthest that a number is from the nearest one: relative, and absolute for small ones."""
SHAPES = arrays.array_shapes(max_dims=3, max_side=5, min_side=0)


@pytest.mark.parametrize("wire", TYPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@EXAMPLES
@given(st.data())
def test_rounding_is_to_the_nearest_or_refused(wire, dtype, data):
    relative, absolute = TYPES[wire]
    array = data.draw(arrays.arrays(dtype, SHAPES, elements=st.floats(width=8 * np.dtype(dtype).itemsize)))
    finite = np.isfinite(array)
    limit = float(ml_dtypes.finfo(wire).max)
    try:
        narrow = narrowed("x", array, wire)
    except InvalidInputError:
        assert (np.abs(array[finite]) > limit).any()
        return
    assert narrow.dtype == wire
    wide = narrow.astype(np.float64)
    np.testing.assert_array_equal(wide[~finite], array[~finite])
    assert np.isfinite(wide[finite]).all()
    exact = array[finite].astype(np.float64)
    assert (np.abs(wide[finite] - exact) <= np.maximum(np.abs(exact) * relative, absolute)).all()


@EXAMPLES
@given(arrays.arrays(np.int64, st.integers(512, 600), elements=st.integers(-40000, 40000)))
def test_narrow_labels_are_the_same_numbers(labels):
    np.testing.assert_array_equal(narrowed_integers(labels), labels)


@st.composite
def images(draw):
    count = draw(st.integers(0, 6))
    low = draw(arrays.arrays(np.float32, (count, 2), elements=st.integers(-20, 90)))
    extent = draw(arrays.arrays(np.float32, (count, 2), elements=st.integers(0, 100)))
    return {
        "boxes": np.concatenate([low, low + extent], axis=1),
        "labels": draw(arrays.arrays(np.int64, count, elements=st.integers(0, 300))),
        "iscrowd": draw(arrays.arrays(np.bool_, count)),
    }


@EXAMPLES
@given(st.lists(images(), max_size=3), st.integers(0, 100), st.integers(0, 100))
def test_sparse_targets_are_the_dense_ones(scenes, height, width):
    assigner = FCOSAssigner(strides=(8, 16), regress_ranges=((-1, 32), (32, float("inf"))))
    sizes = assigner.feature_sizes((height, width))
    assignment = assigner.assign(scenes, sizes)
    sparse = assignment.sparse()
    names = ("locations", "labels", "ltrb", "centerness", "matched", "ignored")
    about = {"positive_counts": (), "feature_sizes": tuple(sizes), "preset": "autotimm", "timings": {}}
    received = SparseTargets(**{name: getattr(sparse, name) for name in names}, **about)
    has_crowd = any(scene["iscrowd"].any() for scene in scenes)
    found = dense_targets(received, DenseForm(batch_size=len(scenes), has_crowd=has_crowd))
    for level, want in zip(found.levels, assignment.dense(), strict=True):
        for name in ("cls", "reg", "centerness", "ignored"):
            value, expected = getattr(level, name), getattr(want, name)
            assert (value is None) == (expected is None)
            if expected is not None:
                assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
                assert value.tobytes() == expected.tobytes()
    arrays_of = [array for level in assignment.dense() for array in (level.cls, level.reg, level.centerness)]
    arrays_of += [level.ignored for level in assignment.dense() if level.ignored is not None]
    assert assignment.dense_bytes == sum(array.nbytes for array in arrays_of)
