"""The same with a GPU: two processes, one of which may die at any time."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from lossd.gpu_memory import GpuArray
from lossd_client import Client, FCOSLoss, FocalLoss, UnavailableError
from lossd_client.torch import RemoteLoss
from lossd_server.losses import FCOSLoss as LocalFCOSLoss
from lossd_server.losses import FocalLoss as LocalFocalLoss
from tests.client.shared.support import LABELS, LOGITS, Outside

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    with Outside(tmp_path_factory.mktemp("gpu"), device="cuda") as running:
        yield running


@pytest.fixture
def client(outside):
    with Client(outside.target, timeout=60) as made:
        yield made


def on_gpu(client, values):
    array = client.allocate_on_gpu(values.shape, values.dtype)
    torch.as_tensor(array, device="cuda").copy_(torch.from_numpy(values))
    return array


def test_a_gradient_comes_where_the_prediction_lies(client, outside):
    result = client.compute_loss(FocalLoss(), on_gpu(client, LOGITS), LABELS, gradients=True)
    gradient = result.gradients["inputs"]
    assert isinstance(gradient, GpuArray)
    with Client(outside.target, shared_memory=False) as inline:
        expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert result.loss == expected.loss
    np.testing.assert_array_equal(gradient.numpy(), expected.gradients["inputs"])
    np.testing.assert_array_equal(
        torch.as_tensor(gradient, device="cuda").cpu().numpy(), expected.gradients["inputs"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_module_trains_as_the_local_one_does(client, dtype):
    labels = torch.from_numpy(LABELS).cuda()
    gradients = []
    for loss in (RemoteLoss(client, FocalLoss()), LocalFocalLoss()):
        logits = torch.from_numpy(LOGITS).to("cuda", dtype).requires_grad_()
        (loss(logits, labels) * 3).backward()
        gradients.append(logits.grad.float())
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_a_head_trains_as_the_local_one_does(client):
    made = torch.Generator(device="cuda").manual_seed(0)
    sizes = ((32, 32), (16, 16), (8, 8), (4, 4), (2, 2))
    heads = [[torch.randn(2, n, *s, generator=made, device="cuda") for s in sizes] for n in (5, 4, 1)]
    truth = [{"boxes": [[10.0, 20.0, 90.0, 100.0]], "labels": [i]} for i in range(2)]
    found = []
    for loss in (RemoteLoss(client, FCOSLoss(5)), LocalFCOSLoss(5)):
        maps = [[level.clone().requires_grad_() for level in kind] for kind in heads]
        loss(*maps, truth)["loss"].backward()
        found.append([level.grad for kind in maps for level in kind])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_many_steps_write_over_nothing_that_is_in_use(client):
    remote, local = RemoteLoss(client, FocalLoss()), LocalFocalLoss()
    labels = torch.from_numpy(LABELS).cuda()
    there, here = (torch.from_numpy(LOGITS.copy()).cuda().requires_grad_() for _ in range(2))
    for _ in range(50):
        for leaf, loss in ((there, remote), (here, local)):
            loss(leaf, labels).backward()
            with torch.no_grad():
                leaf.sub_(leaf.grad * 10)
            leaf.grad = None
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


def test_a_server_that_dies_leaves_the_callers_memory_and_another_takes_it(tmp_path):
    with Outside(tmp_path, device="cuda") as first, Client(first.target, timeout=60, retries=None) as client:
        logits = on_gpu(client, LOGITS)
        before = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True)
        kept = before.gradients["inputs"].numpy()
        first.kill()
        with pytest.raises(UnavailableError):
            client.compute_loss(FocalLoss(), logits, LABELS)
        np.testing.assert_array_equal(before.gradients["inputs"].numpy(), kept)
        with Outside(tmp_path, device="cuda"):
            after = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True, timeout=60)
            np.testing.assert_array_equal(after.gradients["inputs"].numpy(), kept)


CALLER = """
import os, sys
import numpy as np
from lossd_client import Client, FocalLoss
client = Client(sys.argv[1])
logits = client.allocate_on_gpu((16, 8, 64, 64))
client.compute_loss(FocalLoss(), logits, np.zeros((16, 64, 64), np.int64), gradients=True)
print("called", flush=True)
for _ in range(100000):
    client.compute_loss(FocalLoss(), logits, np.zeros((16, 64, 64), np.int64), gradients=True)
"""


def test_a_caller_that_is_killed_takes_nothing_along(client, outside):
    expected = client.compute_loss(FocalLoss(), LOGITS, LABELS).loss
    for _ in range(3):
        caller = subprocess.Popen(
            [sys.executable, "-c", CALLER, outside.target], stdout=subprocess.PIPE, text=True
        )
        assert caller.stdout.readline() == "called\n"
        os.kill(caller.pid, signal.SIGKILL)
        caller.wait(30)
        caller.stdout.close()
        result = client.compute_loss(FocalLoss(), on_gpu(client, LOGITS), LABELS)
        assert result.loss == expected
