"""Existing checkpoints: reading, converting and loading them."""
