"""Georeferenced and tiled rasters."""
