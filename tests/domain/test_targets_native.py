"""What the compiled painter is given stays there until it is done, whatever other threads ask for."""

import numpy as np
import pytest

from lossd_server.kernels import load_library
from lossd_server.targets import FCOSAssigner, native_painting
from tests.domain.support import needs_a_compiler

pytestmark = needs_a_compiler

SIZES = [(20, 20), (10, 10)]
IMAGES = [{"boxes": np.array([[3, 3, 70, 60], [20, 10, 120, 150]], np.float32), "labels": np.array([1, 2])}]


@pytest.fixture(autouse=True)
def _kernels():
    assert load_library() is not None


class Forgetful:
    """The library, which finds that others have had everything forgotten that is kept for later."""

    def __init__(self):
        self._library = load_library()
        self._others = []

    def __getattr__(self, name):
        self._forget()
        return getattr(self._library, name)

    def _forget(self):
        native_painting._ends.cache_clear()
        native_painting._level_addresses.cache_clear()
        self._others += [np.full((2, 2, len(SIZES)), -1.0) for _ in range(100)]


def assigned():
    return FCOSAssigner(strides=(8, 16), regress_ranges=((-1, 64), (64, 1e8))).assign(IMAGES, SIZES).sparse()


def test_what_others_have_forgotten_is_still_there(monkeypatch):
    expected = assigned()
    monkeypatch.setattr(native_painting, "loaded_library", Forgetful)
    for found, wanted in zip(assigned(), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
