"""The browser demo of `segformer app`."""
