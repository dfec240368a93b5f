"""The version, in one place: packaging reads it, plans and checkpoints record it."""

__version__ = "0.2.0"
