"""The gateway: HTTP and text. It owns requests; it knows neither tensors nor KV blocks."""
