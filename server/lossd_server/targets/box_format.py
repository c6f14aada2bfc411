"""How callers write boxes."""

from enum import StrEnum


class BoxFormat(StrEnum):
    """The layout of a box's four numbers."""

    XYXY = "xyxy"
    """Left, top, right, bottom."""
    XYWH = "xywh"
    """Left, top, width, height (COCO)."""
    CXCYWH = "cxcywh"
    """Centre x, centre y, width, height."""
