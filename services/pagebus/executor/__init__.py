"""The executor: tensors, KV pages and the steps of a plan. Knows no text and no other service."""
