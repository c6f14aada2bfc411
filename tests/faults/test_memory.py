"""What a large call takes of a server's memory."""

import numpy as np

from lossd_client import Client, FocalLoss
from tests.faults.support import victim

SHAPE = (16, 80, 100, 100)


def test_a_large_call_takes_little_more_than_its_request_and_its_answer(tmp_path):
    """51 MB there, and 51 back. Of a request that is sent whole gRPC alone holds three times its bytes."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(SHAPE, np.float32)
    labels = rng.integers(-1, SHAPE[1], (SHAPE[0], *SHAPE[2:]))
    with victim(tmp_path) as server, Client(server.address) as client:
        client.compute_loss(FocalLoss(), logits[:1, :, :8, :8], labels[:1, :8, :8], gradients=True)
        before = server.held().rss
        assert server.peak_rss() < before + (16 << 20)  # it has not had more before
        for _ in range(8):
            client.compute_loss(FocalLoss(), logits, labels, gradients=True)
        assert server.peak_rss() - before < 2.2 * logits.nbytes
