"""How well bags are ranked."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, gather_rows
from jaxlab.ops.masked import compute_dtype, safe_divide
from jaxlab.ops.sharding import rows_mixed


def bag_auc(scores: Array, labels: Array, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the area under the ROC curve: how often a positive bag scores above a negative one.

    `mean over pairs (p, n) of [s_p > s_n] + [s_p = s_n] / 2`, in O(B log B).

    Args:
        scores: float [B]; a rank has no gradient.
        labels: int [B], 1 = positive, 0 = negative, -1 = unlabelled, which does not count.
        where: bool [B], real bags.
        axis_name: mapped axis over which the bags are spread.

    Returns:
        Scalar in the accumulation dtype, over the bags of all shards; 0.5 without a positive or without a negative.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(bag_auc(jnp.array([0.1, 0.4, 0.4, 0.9]), jnp.array([0, 0, 1, 1])))
        0.875
    """
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"scores and labels must both be [B], got {scores.shape} and {labels.shape}")
    if where is not None and where.shape != scores.shape:
        raise ValueError(f"where has shape {where.shape}, expected {scores.shape}")
    keep = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    return rows_mixed(_auc)(scores, jnp.asarray(labels), keep, axis_name=axis_name)


def _auc(scores, labels, keep, *, axis_name):
    """Each shard counts the wins of its own positives against the negatives of all."""
    scores = scores.astype(compute_dtype(scores))
    positive, negative = keep & (labels == 1), keep & (labels == 0)
    # What is not negative stands behind all that is, and is cut off again by the minimum.
    ordered = jnp.sort(gather_rows(jnp.where(negative, scores, jnp.inf), axis_name))
    count = all_sum(jnp.sum(negative), axis_name)
    below = jnp.minimum(jnp.searchsorted(ordered, scores, side="left"), count)
    not_above = jnp.minimum(jnp.searchsorted(ordered, scores, side="right"), count)
    won = jnp.where(positive, (below + not_above).astype(scores.dtype) / 2, 0.0)
    pairs = all_sum(jnp.sum(positive), axis_name).astype(scores.dtype) * count.astype(scores.dtype)
    return jnp.where(pairs > 0, safe_divide(all_sum(jnp.sum(won), axis_name), pairs), 0.5)
