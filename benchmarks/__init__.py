"""What is claimed of speed and memory, measured: one script a claim, one function a row."""
