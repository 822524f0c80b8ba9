"""The Downloads window: what the hub has, and the queue."""
