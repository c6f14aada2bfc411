"""Where the elements of an array begin is what numpy says, whatever array it is."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd_server.kernels import address_of

ARRAYS = {
    "of its own": lambda _: np.arange(5.0),
    "a view": lambda _: np.arange(20)[3::2],
    "the end of one": lambda _: np.arange(20)[20:],
    "a number": lambda _: np.array(3.0),
    "without elements": lambda _: np.empty((0, 4)),
    "of a request": lambda _: np.frombuffer(bytes(64), np.float32, offset=5, count=3),
    "bfloat16": lambda _: np.zeros(4, ml_dtypes.bfloat16),
    "a tensor's": lambda _: torch.arange(7)[2:].numpy(),
    "of a file": lambda path: np.memmap(path / "array", np.int16, "w+", 32, (4,)),
    "with names": lambda _: np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
}


@pytest.mark.parametrize("which", ARRAYS)
def test_it_is_where_numpy_says(which, tmp_path):
    array = ARRAYS[which](tmp_path)
    assert address_of(array) == array.ctypes.data
