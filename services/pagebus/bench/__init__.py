"""Benchmarks of pagebus: programs beside the services, which may import any of them."""
