"""Inference on images, folders, data sets and rasters."""
