"""What owns a request: the pure state machine and the thin client that gateways, tools and tests use."""
