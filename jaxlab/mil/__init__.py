"""Multiple-instance learning: one label for a bag of instances."""

__all__ = []
