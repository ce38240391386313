"""Change the weights: adapters, loss, trainer."""
