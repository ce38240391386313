"""Checks of a training step, one module a concept; `check_training` puts them together."""
