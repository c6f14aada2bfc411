"""A custom loss that says something in every way there is, and modules that fail to start."""

import logging
import threading
import warnings

import torch


class _Unraisable:
    def __del__(self):
        raise ValueError("from a destructor")


def _fail():
    raise ValueError("from a thread")


class Noisy(torch.nn.Module):
    def forward(self, pred: torch.Tensor) -> torch.Tensor:
        warnings.warn("from a warning", UserWarning, stacklevel=1)
        logging.getLogger("a.library").error("from %s", "a library")
        logging.getLogger("a.library").info("not worth a line")
        thread = threading.Thread(target=_fail, name="failing")
        thread.start()
        thread.join()
        _Unraisable()
        raise RuntimeError("from\na loss")


class _Fatal(BaseException):
    pass


class Unforeseen(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise _Fatal
