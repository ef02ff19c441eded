"""Version of the package, in a module of its own so that the build reads it without importing PyTorch."""

__version__ = "0.1.0"

__all__ = ["__version__"]
