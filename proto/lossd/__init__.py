"""The lossd contract: stubs in `lossd.v1`, and what a `Tensor` means in `lossd.tensors`."""

__version__ = "0.1.0"
