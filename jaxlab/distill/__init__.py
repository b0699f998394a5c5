"""Passing on what one network knows to another."""

__all__: list[str] = []
