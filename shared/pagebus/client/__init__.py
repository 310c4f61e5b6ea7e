"""The client library of pagebus's public NATS interface."""

from pagebus.client.client import Client, GenerationError

__all__ = ["Client", "GenerationError"]
