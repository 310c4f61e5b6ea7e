"""Traces and logs: inert unless asked for, and never in the way of a request."""
