"""What a request of losses has beside tensors: which loss it is, what is wanted of it, and where."""

from functools import lru_cache
from typing import Any

import numpy as np

from lossd.tensors import TensorError, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd_client._config import LossConfig
from lossd_client._errors import refused_here
from lossd_client._options import Gradients
from lossd_client._storage import Output


@lru_cache(maxsize=64)
def config_field(loss: LossConfig) -> bytes:
    """Returns the part of a request that says which loss it is."""
    return pb.ComputeLossRequest(**{loss.kind: loss.message()}).SerializeToString()


@lru_cache(maxsize=64, typed=True)
def wanted_fields(
    gradients: tuple[str, ...],
    gradient_dtype: Any,
    component_gradients: bool,  # noqa: FBT001  # by place, as it is sooner known again
    strict: bool,  # noqa: FBT001
    sparse_gradients: bool,  # noqa: FBT001
) -> bytes:
    """Returns the part of a request that says what is wanted of each item."""
    request = pb.ComputeLossRequest(
        gradients=gradients,
        gradient_dtype=gradient_dtype,
        component_gradients=component_gradients,
        strict=strict,
        sparse_gradients=sparse_gradients,
    )
    return request.SerializeToString()


@lru_cache(maxsize=1024)
def output_fields(outputs: tuple[Output, ...]) -> bytes:
    """Returns the part of an item that says where gradients are written: in the same memory, mostly."""
    places = [
        pb.GradientOutput(
            input=name,
            slices=[tensor_pb2.SharedSlice(region_id=region_id, offset=offset) for region_id, offset in some],
        )
        for name, some in outputs
    ]
    return pb.LossItem(outputs=places).SerializeToString()


def gradient_names(loss: LossConfig, gradients: Gradients) -> tuple[str, ...]:
    """Returns the inputs whose gradients are asked for; of a custom loss those that are named."""
    if isinstance(gradients, bool):
        return loss.differentiable if gradients else ()
    return (gradients,) if isinstance(gradients, str) else tuple(gradients)


def gradient_dtype_of(dtype: Any) -> Any:
    """Returns the `DataType` of a type that a caller wants; 0 for None."""
    if dtype is None:
        return 0
    try:
        return data_type_of(np.dtype(dtype))
    except TensorError as error:
        reason = pb.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
        raise refused_here(reason, str(error), field="gradient_dtype", **error.values) from error
