"""The lossd contract: generated stubs in `lossd.v1`, and what a `Tensor` means in `lossd.tensors`."""
