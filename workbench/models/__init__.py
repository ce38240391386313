"""A name becomes a network with weights."""
