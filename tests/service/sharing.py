"""A caller that shares memory by hand: a region of its own, and requests whose tensors lie in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from lossd.tensors import DTYPES
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.rpc import Server
from tests.domain.regions import Peer, bytes_of, memory_file
from tests.service.support import focal_arrays, loss_request

REGION_BYTES = 1 << 20


class Caller:
    """A stub over a Unix socket, and a region that its server has."""

    def __init__(self, stub: LossServiceStub, region_id: bytes, memory: np.ndarray, peer: Peer) -> None:
        self.stub = stub
        self.region_id = region_id
        self.memory = memory
        self.peer = peer
        self._top = 0

    def slice(self, length: int) -> tensor_pb2.SharedSlice:
        """A free place of so many bytes."""
        offset, self._top = self._top, self._top + -(-max(length, 1) // 64) * 64
        assert self._top <= REGION_BYTES
        return tensor_pb2.SharedSlice(region_id=self.region_id, offset=offset)

    def share(self, tensor: tensor_pb2.Tensor) -> None:
        """Moves the elements of an inline tensor to a place of their own."""
        data = np.frombuffer(tensor.inline, np.uint8)
        place = self.slice(len(data))
        self.memory[place.offset : place.offset + len(data)] = data
        tensor.shared.CopyFrom(place)

    def add_output(self, item: pb.LossItem, name: str, tensors: Any, dtype: int = 0) -> pb.GradientOutput:
        """Gives the gradient for tensors, one or some levels, a place."""
        output = item.outputs.add(input=name)
        for tensor in [tensors] if isinstance(tensors, tensor_pb2.Tensor) else tensors:
            itemsize = DTYPES[dtype or tensor.dtype].itemsize
            output.slices.append(self.slice(int(np.prod(tensor.shape)) * itemsize))
        return output

    def read(self, tensor: tensor_pb2.Tensor) -> tensor_pb2.Tensor:
        """A tensor of an answer with its elements inline."""
        assert tensor.WhichOneof("storage") == "shared"
        assert not tensor.inline
        dtype, place = DTYPES[tensor.dtype], tensor.shared
        length = int(np.prod(tensor.shape)) * dtype.itemsize
        data = self.memory[place.offset : place.offset + length].tobytes()
        return tensor_pb2.Tensor(dtype=tensor.dtype, shape=tensor.shape, inline=data)


@contextmanager
def sharing_caller(server: Server) -> Iterator[Caller]:
    """A caller on the server's first Unix socket."""
    target = next(address for address in server.addresses if address.startswith("unix:"))
    with grpc.insecure_channel(target) as channel:
        stub = LossServiceStub(channel)
        info = stub.GetServerInfo(pb.GetServerInfoRequest())
        with Peer(info.shared_memory_socket) as peer, memory_file(REGION_BYTES) as descriptor:
            memory = bytes_of(descriptor, REGION_BYTES)
            region_id = peer.pass_region(descriptor, REGION_BYTES).region_id
            yield Caller(stub, region_id, memory, peer)


def tensors_of(message: Any) -> Mapping[str, tensor_pb2.Tensor]:
    """Every tensor in a message, by path."""
    found: dict[str, tensor_pb2.Tensor] = {}
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        repeated = not hasattr(value, "DESCRIPTOR")
        entries = (
            dict(value) if hasattr(value, "items") else dict(enumerate(value)) if repeated else {"": value}
        )
        for key, entry in entries.items():
            path = f"{field.name}[{key}]" if key != "" else field.name
            if isinstance(entry, tensor_pb2.Tensor):
                found[path] = entry
            else:
                found |= {f"{path}.{inner}": tensor for inner, tensor in tensors_of(entry).items()}
    return found


def shared(caller, request):
    """The request with all its tensors in shared memory, and places for its gradients."""
    copy = pb.ComputeLossRequest()
    copy.CopyFrom(request)
    for tensor in tensors_of(copy).values():
        caller.share(tensor)
    for item in copy.items:
        inputs = getattr(item, item.WhichOneof("inputs"))
        for name in copy.gradients:
            tensors = inputs.tensors[name] if copy.HasField("custom") else getattr(inputs, name)
            caller.add_output(item, name, tensors, copy.gradient_dtype)
    return copy


def answer_inline(caller, response):
    """An answer with the gradients in shared memory put inline, and without timings."""
    for result in response.results:
        for gradient in result.gradients:
            for tensor in gradient.tensors:
                tensor.CopyFrom(caller.read(tensor))
    response.ClearField("timings")
    return response


def focal(caller):
    """A good request in shared memory with a place for the gradient."""
    request = loss_request(
        losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(7), 40)], gradients=["inputs"]
    )
    request = shared(caller, request)
    return request, request.items[0]
