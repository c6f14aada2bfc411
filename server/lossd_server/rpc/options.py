"""The server's gRPC options, each with its reason."""

from lossd_server.config import MEBIBYTE, ServerConfig

# Larger frames mean fewer of them: 12.6 -> 6.9 ms for a message of 6.4 MB.
_FRAME_BYTES = 16 * MEBIBYTE - 1


def server_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Returns the options of a server with these settings."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # An answer is about as large as its request; what was read is answered.
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.max_frame_size", _FRAME_BYTES),
        # A port that another server has is an error, not half of the calls each.
        ("grpc.so_reuseport", 0),
        # Clients ping idle connections every 20 s and more often is tolerated.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
