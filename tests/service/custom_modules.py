"""Loss modules of an operator's, good and bad, as `--load` finds them."""

import threading

import torch
from torch import Tensor, nn

SECRET = "the password is swordfish"  # noqa: S105  # nobody's; it must not reach a caller
entered = threading.Event()
"""Set when `Held` begins to run."""
release = threading.Event()
"""What `Held` waits for."""


class Squared(nn.Module):
    """A loss with a gradient and an optional input."""

    def forward(self, pred: Tensor, target: Tensor, scale: Tensor | None = None) -> Tensor:
        rows = (pred - target) ** 2
        return rows.mean() if scale is None else (rows * scale).mean()


class Named(nn.Module):
    """A loss with components, of which one is no tensor."""

    def forward(self, pred: Tensor) -> dict[str, Tensor | str]:
        return {"total_loss": pred.abs().sum(), "l2": (pred**2).sum(), "remark": "not a tensor"}


class Rows(nn.Module):
    """A loss of one number a row."""

    def forward(self, pred: Tensor) -> Tensor:
        return (pred**2).sum(dim=1)


class Raises(nn.Module):
    """Fails, with a message that is nobody's business."""

    def forward(self, pred: Tensor) -> Tensor:
        raise RuntimeError(SECRET)


class Exits(nn.Module):
    """Fails with what is no `Exception`."""

    def forward(self, pred: Tensor) -> Tensor:
        raise SystemExit(SECRET)


class NotANumber(nn.Module):
    """Returns NaN."""

    def forward(self, pred: Tensor) -> Tensor:
        return pred.sum() * torch.nan


class NoTensor(nn.Module):
    """Returns what is no tensor."""

    def forward(self, pred: Tensor) -> float:
        return float(pred.sum())


class NoTotal(nn.Module):
    """Returns a mapping without the loss."""

    def forward(self, pred: Tensor) -> dict[str, Tensor]:
        return {"part": pred.sum()}


class Whole(nn.Module):
    """Returns a tensor of integers."""

    def forward(self, pred: Tensor) -> Tensor:
        return pred.sum().long()


class Float8(nn.Module):
    """Returns a float type that the contract lacks."""

    def forward(self, pred: Tensor) -> Tensor:
        return pred.sum().to(torch.float8_e5m2)


class Detached(nn.Module):
    """Returns a loss that no input reaches."""

    def forward(self, pred: Tensor) -> Tensor:
        return pred.detach().sum()


class InPlace(nn.Module):
    """Writes to what it was given."""

    def forward(self, pred: Tensor, flag: Tensor) -> Tensor:
        flag.fill_(7)
        with torch.no_grad():
            pred.mul_(2)
        return pred.sum()


class Hungry(nn.Module):
    """Runs out of memory for more than two numbers, and the first time for any."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, pred: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1 or pred.numel() > 2:
            raise torch.OutOfMemoryError(SECRET)
        return pred.sum()


class Held(nn.Module):
    """Holds the device until the test lets go."""

    def forward(self, pred: Tensor) -> Tensor:
        entered.set()
        release.wait(60)
        return pred.sum()


ALL = tuple(
    f"{__name__}:{kind.__name__}"
    for kind in (Squared, Named, Rows, Raises, Exits, NotANumber, NoTensor, NoTotal, Whole, Float8, Detached)
)
