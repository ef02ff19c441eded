"""Checkpoint files: reading, converting and loading them."""
