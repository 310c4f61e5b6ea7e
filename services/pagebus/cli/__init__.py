"""The `pagebus` command: one service each, or everything on one machine."""
