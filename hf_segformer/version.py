"""The package's version, alone here so that the build reads it without importing torch."""

__version__ = "0.1.0"
