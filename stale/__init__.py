"""STALE: zero-shot temporal action detection via vision-language prompting."""

__version__ = "0.1.0"
