"""How much is evaluated in one go."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How much is evaluated before another job may have the device, of one job or of several together.

    Attributes:
        together: Whether jobs that wait go together; None means where that pays, which is on a GPU.
        max_items: Most items.
        max_bytes: Most bytes of tensors, read and written; a single item may be larger.
        wait_seconds: How long a batch that is not full waits for company.
    """

    together: bool | None = None
    max_items: int = 64
    max_bytes: int = 64 << 20
    wait_seconds: float = 0.0

    def is_on(self, device: torch.device) -> bool:
        """Whether jobs go together on a device."""
        return device.type == "cuda" if self.together is None else self.together
