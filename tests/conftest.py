"""What tests of several layers share."""

import os
from pathlib import Path

import pytest

from tests.certificates import Authority


@pytest.fixture(scope="session")
def coco_file() -> Path:
    """Real COCO annotations: 100 images of the 2014 validation set, boxes only."""
    shared = Path(os.environ.get("LOSSD_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "data" / "coco_val2014_100_boxes.json"
    if not path.exists():
        pytest.skip(f"no COCO annotations at {path}")
    return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that both sides of a connection know."""
    return Authority(tmp_path, "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that nobody knows."""
    return Authority(tmp_path, "theirs")
