"""Arrays that are made in shared memory, and sent where they lie."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd_client import (
    FocalLoss,
    _storage,
)
from tests.client.shared.support import LABELS, LOGITS, assert_same


def test_an_allocated_array_is_sent_where_it_lies(client, inline, monkeypatch):
    logits = client.allocate(LOGITS.shape)
    labels = client.allocate(LABELS.shape, LABELS.dtype)
    logits[:], labels[:] = LOGITS, LABELS
    assert (logits.dtype, logits.flags.writeable) == (np.float32, True)
    copied = []
    monkeypatch.setattr(_storage.np, "copyto", lambda *arguments: copied.append(arguments))
    result = client.compute_loss(FocalLoss(), logits, labels, gradients=True)
    assert not copied
    monkeypatch.undo()
    assert_same(result, inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True))
    assert not np.shares_memory(result.gradients["inputs"], logits)


@pytest.mark.parametrize("change", [lambda a: a, torch.from_numpy, lambda a: a.reshape(-1).reshape(a.shape)])
def test_views_of_an_allocated_array_are_sent_where_they_lie(client, inline, change, monkeypatch):
    several = client.allocate((3, *LOGITS.shape))
    several[:] = LOGITS
    copied = []
    monkeypatch.setattr(_storage.np, "copyto", lambda place, array: copied.append(array.dtype))
    client.compute_loss(FocalLoss(), change(several[1]), np.zeros_like(LABELS), gradients=True)
    assert copied == [LABELS.dtype]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "f4"), (7, "f8"), ((2, 0), "i8"), ((3,), "O"), ((5, 5), ml_dtypes.bfloat16)]
)
def test_allocate_takes_what_numpy_takes(client, shape, dtype):
    array = client.allocate(shape, dtype)
    assert (array.shape, array.dtype) == (np.empty(shape, dtype).shape, np.dtype(dtype))


def test_allocate_refuses_what_numpy_refuses(client):
    with pytest.raises(ValueError, match="negative"):
        client.allocate((2, -1))
    with pytest.raises(TypeError):
        client.allocate((2,), "nothing")
