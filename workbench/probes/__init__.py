"""Instruments; they know no trainer."""
