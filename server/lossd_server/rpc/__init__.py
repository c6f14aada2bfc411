"""The service: decode, ask the engine, encode; and the server around it."""

from lossd_server.rpc.server import Server

__all__ = ["Server"]
