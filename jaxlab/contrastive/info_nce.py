"""InfoNCE: what many contrastive papers share."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import axis_index, gather_rows, global_mean
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_normalize, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def info_nce_loss(
    anchors: Array,
    positives: Array,
    *,
    temperature: float = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the InfoNCE loss with in-batch negatives.

    `l_i = -s_ii / T + log sum_j exp(s_ij / T)` with `s_ij = cos(a_i, p_j)`, j over the kept rows of all devices.

    Args:
        anchors: float [N, D], need not be normalised.
        positives: float [N, D], row i belongs to anchor i.
        temperature: T > 0.
        where: bool [N], real rows; others are neither anchors nor negatives.
        axis_name: mesh axis over which the rows are spread; negatives then come from all devices.
        reduction: `mean` over the kept anchors of all devices, or `none`.

    Returns:
        Scalar in the dtype of anchors (0 without rows), or [N] with `reduction="none"` (0 on masked rows). A row alone
        has no negative and gives 0.

    Raises:
        ValueError: shapes differ, temperature is not positive or the reduction is unknown.

    Example:
        >>> x = jnp.eye(2)
        >>> round(float(info_nce_loss(x, x, temperature=1.0)), 4)
        0.3133

    Source:
        van den Oord, Li, Vinyals, Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748, eq. 4.
    """
    if anchors.ndim != 2 or anchors.shape != positives.shape:
        raise ValueError(f"anchors and positives must both be [N, D], got {anchors.shape} and {positives.shape}")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'none'")
    if where is not None and where.shape != anchors.shape[:1]:
        raise ValueError(f"where must have shape {anchors.shape[:1]}, got {where.shape}")
    keep = jnp.ones(anchors.shape[0], bool) if where is None else where

    def terms(anchors, positives, keep):
        dtype = compute_dtype(anchors, positives)
        a, p = (safe_normalize(zero_where_false(x, keep).astype(dtype)) for x in (anchors, positives))
        everyone, kept = gather_rows(p, axis_name), gather_rows(keep, axis_name)
        scores = a @ everyone.T / temperature
        own = axis_index(axis_name) * a.shape[0] + jnp.arange(a.shape[0])
        # The anchor's own column always counts, so that a masked row has a finite value before it is dropped.
        columns = kept[None, :] | (own[:, None] == jnp.arange(everyone.shape[0])[None, :])
        positive = jnp.sum(a * p, axis=-1) / temperature
        return zero_where_false(masked_logsumexp(scores, columns) - positive, keep)

    losses = rows_mixed(terms)(anchors, positives, keep)
    if reduction == "none":
        return losses.astype(anchors.dtype)
    return global_mean(losses, keep, axis_name=axis_name).astype(anchors.dtype)
