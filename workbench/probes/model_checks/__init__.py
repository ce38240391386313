"""One module a group of properties; `invariants.check_model` runs them all."""
