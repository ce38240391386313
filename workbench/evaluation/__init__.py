"""Generate and score."""
