"""What a person watches; the only place that knows matplotlib."""
