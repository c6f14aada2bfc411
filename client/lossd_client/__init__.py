"""A thin client of lossd: numpy in, numpy out, and no torch unless `lossd_client.torch` is imported.

```python
from lossd_client import Client, FocalLoss

with Client("localhost:50051") as client:
    result = client.compute_loss(FocalLoss(), logits, targets, gradients=True)
```
"""

from lossd_client._access import TLS
from lossd_client._arrays import Array
from lossd_client._configs import CenternessLoss, CustomLoss, FocalLoss, GIoULoss
from lossd_client._errors import (
    AccessError,
    DeadlineError,
    InvalidInputError,
    LossdError,
    NotFoundError,
    ServerError,
    TooLargeError,
    UnavailableError,
)
from lossd_client._fcos_configs import FCOSAssigner, FCOSLoss
from lossd_client._results import LossResult, NonFinite, ServerInfo
from lossd_client._retries import RetryPolicy
from lossd_client._targets import DenseLevel, DenseTargets, SparseTargets
from lossd_client.aio import AsyncClient
from lossd_client.client import Client

__all__ = [
    "TLS",
    "AccessError",
    "Array",
    "AsyncClient",
    "CenternessLoss",
    "Client",
    "CustomLoss",
    "DeadlineError",
    "DenseLevel",
    "DenseTargets",
    "FCOSAssigner",
    "FCOSLoss",
    "FocalLoss",
    "GIoULoss",
    "InvalidInputError",
    "LossResult",
    "LossdError",
    "NonFinite",
    "NotFoundError",
    "RetryPolicy",
    "ServerError",
    "ServerInfo",
    "SparseTargets",
    "TooLargeError",
    "UnavailableError",
]
