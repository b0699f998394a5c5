"""The `reduction` argument that all losses share."""

from __future__ import annotations

from typing import Any

from jax import Array

from jaxlab.ops.collectives import global_mean
from jaxlab.ops.masked import zero_where_false


def reduce_terms(
    terms: Array,
    where: Array | None = None,
    *,
    reduction: str = "mean",
    axis_name: str | None = None,
    dtype: Any = None,
) -> Array:
    """Returns the mean of a loss's terms over all shards, or the terms themselves.

    Args:
        terms: [...], one per example, in the dtype of accumulation.
        where: bool, shape of `terms`, which of them exist; None = all.
        reduction: "mean", a scalar in the dtype of `terms`, 0 with zero gradient without any term; or "none", the terms
            of this shard with 0 where there is none.
        axis_name: mapped axis over which the terms are spread.
        dtype: of the result of "none"; None = that of `terms`.

    Raises:
        ValueError: `reduction` is neither of the two.

    Example:
        >>> import jax.numpy as jnp
        >>> reduce_terms(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])).tolist()
        2.0
    """
    if reduction == "mean":
        return global_mean(terms, where, axis_name=axis_name)
    if reduction == "none":
        return zero_where_false(terms, where).astype(dtype or terms.dtype)
    raise ValueError(f"reduction={reduction!r} must be 'mean' or 'none'")
