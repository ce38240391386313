"""Faults: whatever lies on disk or happens to a process, nothing is lost and nothing dies."""
