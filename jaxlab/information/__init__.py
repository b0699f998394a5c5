"""Mutual information: estimators, bounds and objectives built on them."""

__all__ = []
