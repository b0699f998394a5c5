"""InfoNCE and NT-Xent: tell the other view of the same example from those of other examples.

Representation Learning with Contrastive Predictive Coding (2018, arXiv 1807.03748) and A Simple Framework for
Contrastive Learning of Visual Representations (SimCLR, 2020, arXiv 2002.05709). What the family's methods stand on and
are compared with.

    InfoNCE:  -log  exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t)
    NT-Xent:  the same between all views of all examples, each embedding but the anchor itself in the sum
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where, own_index, unit_rows
from jaxlab.ops.chunks import map_rows
from jaxlab.ops.collectives import gather_rows
from jaxlab.ops.masked import masked_logsumexp
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def info_nce_loss(
    a: Array,
    b: Array,
    *,
    temperature: float | Array = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Array:
    """Returns the InfoNCE loss of telling `b[i]` from the other rows of `b`, given `a[i]`.

    `mean_i [ log sum_j exp(cos(a_i, b_j) / t) - cos(a_i, b_i) / t ]`; for both directions, add that of (b, a).

    Args:
        a: float [N, D], anchors; need not be normalised, a zero vector has cosine 0 with everything.
        b: float [N, D], `b[i]` belongs to `a[i]`; the others are its negatives.
        temperature: t > 0 (SimCLR's best on ImageNet is 0.1).
        where: bool [N], real pairs; the others are neither anchors nor negatives.
        axis_name: mapped axis over which the pairs are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.
        chunk: anchors that are compared at a time, forward and backward, so that memory is linear in N; None = all.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `a`. A pair without
        negatives has loss 0; no pair gives 0.

    Raises:
        ValueError: shapes do not fit, temperature is not positive, or reduction is unknown.

    Example:
        >>> x = jnp.eye(4)
        >>> float(info_nce_loss(x, x)) < float(info_nce_loss(x, x[::-1]))
        True

    Source:
        van den Oord et al., arXiv 1807.03748, eq. 4, with the cosine and temperature of Chen et al., arXiv 2002.05709.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape [N, D], got {a.shape} and {b.shape}")
    keep = checked_where(where, a.shape[0], temperature)
    terms = rows_mixed(_info_nce_terms)(a, b, keep, temperature=temperature, axis_name=axis_name, chunk=chunk)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=a.dtype)


def nt_xent_loss(
    views: Array,
    *,
    temperature: float | Array = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Array:
    """Returns SimCLR's loss between V views of B examples.

    For anchor view v of example i, averaged over its positives w != v:
    `log sum_{(u, j) != (v, i)} exp(cos(z_vi, z_uj) / t) - cos(z_vi, z_wi) / t`.

    Args:
        views: float [V, B, D], V >= 2 views of each example; need not be normalised.
        temperature: t > 0 (0.1 is SimCLR's best on ImageNet, 0.5 on CIFAR).
        where: bool [B], real examples.
        axis_name: mapped axis over which the examples are spread: negatives come from all shards.
        reduction: "mean" over anchors (of all shards) or "none", `[V, B]`.
        chunk: examples that are compared at a time, forward and backward, so that memory is linear in B; None = all.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[V, B]` in the dtype of `views`. With a
        single example and V = 2 there is nothing to tell apart, and the loss is 0; no example gives 0.

    Raises:
        ValueError: `views` is not [V >= 2, B, D], `where` does not fit, or an option is out of range.

    Example:
        >>> views = jnp.stack([jnp.eye(4), jnp.eye(4)])
        >>> float(nt_xent_loss(views)) < float(nt_xent_loss(views.at[1].set(views[1, ::-1])))
        True

    Source:
        Chen et al., arXiv 2002.05709, eq. 1. Reconstructed: for V > 2 the mean over positives stands outside the
        logarithm, and the other positives remain in the sum, as in Khosla et al., arXiv 2004.11362, eq. 2.
    """
    if views.ndim != 3 or views.shape[0] < 2:
        raise ValueError(f"views must be [V, B, D] with V >= 2 views, got {views.shape}")
    keep = checked_where(where, views.shape[1], temperature)
    terms = rows_mixed(_nt_xent_terms)(views, keep, temperature=temperature, axis_name=axis_name, chunk=chunk)
    anchors = jnp.broadcast_to(keep[None, :], terms.shape)
    return reduce_terms(terms, anchors, reduction=reduction, axis_name=axis_name, dtype=views.dtype)


def _info_nce_terms(a, b, keep, *, temperature, axis_name, chunk):
    a, b = unit_rows(a, keep), unit_rows(b, keep)
    others, exist = gather_rows(b, axis_name), gather_rows(keep, axis_name)

    def block(a, index):
        logits = jnp.matmul(a, others.T, precision=jax.lax.Precision.HIGHEST) / temperature
        # An anchor's own pair always stands in the sum, so that the masked anchors, too, have a finite logarithm.
        own = index[:, None] == jnp.arange(len(others))[None, :]
        return masked_logsumexp(logits, own | exist[None, :]) - jnp.sum(jnp.where(own, logits, 0.0), axis=1)

    return map_rows(block, a, own_index(len(a), axis_name), chunk=chunk)


def _nt_xent_terms(views, keep, *, temperature, axis_name, chunk):
    num_views, rows, _ = views.shape
    unit = unit_rows(jnp.moveaxis(views, 1, 0), keep)
    others, exist = gather_rows(unit, axis_name), gather_rows(keep, axis_name)
    total = len(others)

    def block(unit, index):
        logits = jnp.einsum("ivd,jud->ivuj", unit, others, precision=jax.lax.Precision.HIGHEST) / temperature
        example = (index[:, None] == jnp.arange(total)[None, :])[:, None, None, :]
        view = jnp.eye(num_views, dtype=bool)[None, :, :, None]
        positive = example & jnp.logical_not(view)
        counted = positive | (jnp.logical_not(example) & exist[None, None, None, :])
        flat = (len(unit), num_views, num_views * total)
        log_sum = masked_logsumexp(logits.reshape(flat), jnp.broadcast_to(counted, logits.shape).reshape(flat))
        return log_sum - jnp.sum(jnp.where(positive, logits, 0.0), axis=(2, 3)) / (num_views - 1)

    return map_rows(block, unit, own_index(rows, axis_name), chunk=chunk).T
