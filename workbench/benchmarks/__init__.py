"""The same work done by this trainer, by mlx-lm and by torch with PEFT, stepped in turn."""
