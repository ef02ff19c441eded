"""Scans: DICOM and NIfTI, read slice by slice and written back in kind."""
