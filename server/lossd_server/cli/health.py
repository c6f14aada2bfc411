"""`lossd health`: whether a server serves, for probes that run a command."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lossd_client import TLS


def run(target: str, *, service: str, timeout: float, tls: TLS | None) -> None:
    """Prints the status of a service, "" for all, at a target; exits with 1 unless it is SERVING."""
    with grpc.insecure_channel(target) if tls is None else _secure_channel(target, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            sys.exit(f"lossd: {target}: {error.code().name}: {error.details()}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(status)
    sys.exit(answer.status != health_pb2.HealthCheckResponse.SERVING)


def _secure_channel(target: str, tls: TLS) -> grpc.Channel:
    return grpc.secure_channel(target, tls.credentials(), tls.options())
