"""Spoilt requests against a live server: whatever they are, the answer is a result or a clean refusal."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

import grpc

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from tests.fuzz.mutations import NUMBERS, Mutator, valid_requests
from tests.service.support import good_loss_request, refusal_of

SERVICE = "/lossd.v1.LossService"
CLEAN = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What a spoilt request may be refused with, beside being answered: it may still be a good one."""

TIMEOUT_SECONDS = 60
GOOD_EVERY = 500
STREAM_REQUESTS = 20

_METADATA = (
    "x-lossd",
    "authorization",
    "traceparent",
    "user-agent",
    "grpc-tags-bin",
    "x-bin",
    "cookie",
    "te",
)


class Attack:
    """Calls of one connection.

    Args:
        address: Of the server.
        seed: Of all that is random.

    Attributes:
        outcomes: How often each method was answered with what.
    """

    def __init__(self, address: str, seed: int) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._random = random.Random(seed)  # noqa: S311  # not for secrets
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = LossServiceStub(self._channel)
        self._mutators = {method: Mutator(requests, seed) for method, requests in valid_requests().items()}
        self._expected = self._good()

    def run(self, count: int) -> None:
        """Makes spoilt requests until so many are answered, and a good one now and then.

        Raises:
            AssertionError: An answer is neither a result nor a clean refusal, or the good one another.
        """
        with self._channel:
            next_good = GOOD_EVERY
            while self.outcomes.total() < count:
                method = self._random.choice(list(self._mutators))
                self._caller(method)(method)
                if self.outcomes.total() >= next_good:
                    next_good += GOOD_EVERY
                    self._check_good()
            self._check_good()

    def _caller(self, method: str) -> Callable[[str], None]:
        if method.endswith("InChunks"):
            return self._in_chunks
        return self._stream if method.endswith("Stream") else self._unary

    def _check_good(self) -> None:
        assert self._good() == self._expected

    def _good(self) -> bytes:
        answer = self._stub.ComputeLoss(good_loss_request(), timeout=TIMEOUT_SECONDS)
        answer.ClearField("timings")
        return answer.SerializeToString(deterministic=True)

    def _unary(self, method: str) -> None:
        call: Any = self._channel.unary_unary(f"{SERVICE}/{method}")
        data = self._mutators[method].request()
        try:
            call(data, timeout=TIMEOUT_SECONDS, metadata=self._metadata())
        except grpc.RpcError as error:
            self._refused(method, error, data)
        else:
            self.outcomes[method, "OK"] += 1

    def _in_chunks(self, method: str) -> None:
        """Sends one request in chunks of any length, some of them spoilt as well."""
        call: Any = self._channel.stream_stream(f"{SERVICE}/{method}")
        chunks = [*self._cut(self._mutators[method].request())]
        if self._random.random() < 0.3:
            self._spoil(chunks)
        try:
            answer = list(call(iter(chunks), timeout=TIMEOUT_SECONDS, metadata=self._metadata()))
        except grpc.RpcError as error:
            self._refused(method, error, b"|".join(chunks))
        else:
            chunk_type = pb.ComputeLossInChunksResponse
            pb.ComputeLossResponse.FromString(b"".join(chunk_type.FromString(chunk).data for chunk in answer))
            self.outcomes[method, "OK"] += 1

    def _cut(self, data: bytes) -> Iterator[bytes]:
        places = sorted(self._random.randrange(len(data) + 1) for _ in range(self._random.randrange(4)))
        for start, stop in pairwise([0, *places, len(data)]):
            size = 0 if start else len(data)
            yield pb.ComputeLossInChunksRequest(message_bytes=size, data=data[start:stop]).SerializeToString()

    def _spoil(self, chunks: list[bytes]) -> None:
        """Says another length, or takes a chunk away, doubles it, or puts something else in its place."""
        index = self._random.randrange(len(chunks))
        chunk = pb.ComputeLossInChunksRequest.FromString(chunks[index])
        chunk.message_bytes = self._random.choice(NUMBERS)
        other = self._random.choice((chunk.SerializeToString(), self._random.randbytes(9)))
        chunks[index : index + 1] = self._random.choice(([], [chunks[index]] * 2, [other], [other]))

    def _stream(self, method: str) -> None:
        """Sends requests on one stream until it ends; each that was read is answered, or has ended it."""
        call: Any = self._channel.stream_stream(f"{SERVICE}/{method}")
        answer_type = pb.ComputeLossStreamResponse if "Loss" in method else pb.AssignTargetsStreamResponse
        sent: list[bytes] = []
        answers = 0
        try:
            requests = self._recorded(method, sent)
            for answer in call(requests, timeout=TIMEOUT_SECONDS, metadata=self._metadata()):
                answers += 1
                self._stream_answer(method, answer_type.FromString(answer), sent)
        except grpc.RpcError as error:
            self._refused(method, error, b"".join(sent))
        else:
            assert answers == len(sent), f"{answers} answers to {len(sent)} requests on {method}"

    def _recorded(self, method: str, sent: list[bytes]) -> Iterator[bytes]:
        for data in islice(iter(self._mutators[method].request, None), STREAM_REQUESTS):
            sent.append(data)
            yield data

    def _stream_answer(self, method: str, answer: Any, sent: list[bytes]) -> None:
        if answer.WhichOneof("outcome") == "response":
            self.outcomes[method, "OK"] += 1
            return
        code = next(code for code in grpc.StatusCode if code.value[0] == answer.error.code)
        assert code in CLEAN, f"{method}: {answer.error} on one of {[data.hex() for data in sent]}"
        assert answer.error.reason
        self.outcomes[method, f"{code.name} in the stream"] += 1

    def _refused(self, method: str, error: grpc.RpcError, data: bytes) -> None:
        found = refusal_of(error)
        assert found.code in CLEAN, f"{method}: {found} on {data.hex()}"
        # gRPC itself refuses metadata that are too long, and says so without details of ours.
        assert found.domain == "lossd" or "metadata" in found.message.lower(), f"{method}: {found}"
        self.outcomes[method, found.code.name] += 1

    def _metadata(self) -> list[tuple[str, Any]]:
        """None mostly, otherwise some that mean nothing to lossd; by chance more than gRPC takes."""
        if self._random.random() < 0.8:
            return []
        return [self._pair() for _ in range(self._random.randint(1, 5))]

    def _pair(self) -> tuple[str, Any]:
        key = self._random.choice(_METADATA)
        length = self._random.choice((0, 1, 20, 300, 3000) if self._random.random() < 0.98 else (40_000,))
        if key.endswith("-bin"):
            return key, self._random.randbytes(length)
        return key, "".join(self._random.choices([chr(code) for code in range(0x20, 0x7F)], k=length)).strip()
