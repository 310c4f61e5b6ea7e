"""Continuous batches and KV blocks; no torch, no text."""
