"""Passing on what one network knows to another."""

__all__ = []
