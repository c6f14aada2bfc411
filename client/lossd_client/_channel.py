"""The client's gRPC options, each with its reason."""

import json
from typing import Any

MEBIBYTE = 1 << 20

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "lossd.v1.LossService"}],
            # Every method is idempotent, so whatever was not answered may be asked again.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

OPTIONS: tuple[tuple[str, Any], ...] = (
    # What a client may send is the server's to say; what it asked for it will read.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Larger frames mean fewer of them: 12.6 -> 6.9 ms for a message of 6.4 MB.
    ("grpc.http2.max_frame_size", 16 * MEBIBYTE - 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # gRPC gives up retrying a request that is larger than this buffer; the default is 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", 2048 * MEBIBYTE - 1),
    # A server that comes back is noticed within seconds, not after the two minutes of the default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A peer that is gone without a word is noticed while a call waits for it.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
