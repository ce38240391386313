"""A training step on shapes alone: its graph, the order of its operations, the bytes it holds."""
