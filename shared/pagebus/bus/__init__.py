"""The bus: messages, subjects, the Bus protocol and its NATS and in-memory forms."""
