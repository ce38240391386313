"""What works on this machine: small checks, each of which returns one record."""
