"""Browser demo of `segformer app`."""
