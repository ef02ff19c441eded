"""Videos: a reader of frames and timestamps, and a writer of overlays, frame masks and class shares (PyAV)."""
