"""Batch inference on a Ray cluster, of folders and of object storage."""
