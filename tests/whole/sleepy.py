"""A loss that takes its time, to be loaded by a server."""

import time

from torch import nn


class Sleepy(nn.Module):
    """Sleeps for half a minute."""

    def forward(self, pred):
        time.sleep(30)
        return pred.sum()
