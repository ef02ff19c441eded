"""The `segformer` command."""
