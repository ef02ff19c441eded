"""The programs that read recipes, and what they share; run them from the repository's root with `python -m`."""
