"""Cost estimates and timings of models."""
