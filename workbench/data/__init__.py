"""Rows become token batches."""
