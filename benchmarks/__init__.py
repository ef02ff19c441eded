"""Measurements of speed and memory: one script for each kind of work, one function for each row."""
