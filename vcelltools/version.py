"""The version, on the ground floor: every room may record which version wrote a file."""

__version__ = "0.1.0"
