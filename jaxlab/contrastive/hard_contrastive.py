"""Understanding the Behaviour of Contrastive Loss (2020, arXiv 2012.09740).

The temperature decides how much of the softmax loss falls on the hardest negatives: small ones spread the embeddings
evenly, but push similar examples apart as well; large ones tolerate these, but see no negative in particular. A loss
that is hard by construction, because it keeps only the hardest negatives, can afford the larger temperature.

    s_ij  = cos(a_i, b_j),   r_ij = exp(s_ij / t) / sum_{k != i} exp(s_ik / t)                  relative penalty
    hard  : -log exp(s_ii / t) / (exp(s_ii / t) + sum_{k kept} exp(s_ik / t)),   kept: s_ik >= sg(upper alpha quantile)
    simple: -s_ii + weight sum_{k kept} s_ik                        no hardness; hard all the same with alpha below 1
    uniformity = log E exp(-2 |f(x) - f(y)|^2),   tolerance = E f(x) . f(y) over pairs of one class

r is what a negative's gradient is, as a share of the positive's; it has sum 1 and an entropy that grows with t. With
alpha = 1 the hard loss is `info_nce_loss`; t times that goes to max(0, max_k s_ik - s_ii) for t to 0, and for large t
it is the simple loss with weight 1 / N, up to constants.

Reconstructed: masks; with n negatives the ceil(alpha n) hardest are kept, and all that equal the last of them; the
defaults alpha = 0.1 and temperature = 0.3 (the paper takes values of this size).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.contrastive._pairs import checked_where, own_columns, unit_rows
from jaxlab.ops.collectives import all_sum, gather_rows
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_softmax, masked_sum, safe_divide
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def hard_contrastive_loss(
    a: Array,
    b: Array,
    *,
    alpha: float = 0.1,
    temperature: float | Array = 0.3,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the InfoNCE loss of each pair against the hardest share `alpha` of its negatives.

    Args:
        a: float [N, D], anchors; need not be normalised.
        b: float [N, D], `b[i]` belongs to `a[i]`; the others are its negatives.
        alpha: in (0, 1], share of the negatives that is kept; 1 gives `info_nce_loss`.
        temperature: t > 0.
        where: bool [N], real pairs; the others are neither anchors nor negatives.
        axis_name: mapped axis over which the pairs are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `a`. A pair without
        negatives has loss 0; no pair gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> both = jax.jit(lambda a, b: [hard_contrastive_loss(a, b, alpha=alpha) for alpha in (0.1, 1.0)])
        >>> hard, plain = both(np.eye(4), np.eye(4)[::-1])
        >>> bool(hard < plain)
        True

    Source:
        Wang, Liu, arXiv 2012.09740, equation 8.
    """
    keep = _checked_pairs(a, b, where, temperature, alpha)
    options = {"alpha": alpha, "temperature": temperature, "axis_name": axis_name}
    terms = rows_mixed(_hard_terms)(a, b, keep, **options)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=a.dtype)


def simple_contrastive_loss(
    a: Array,
    b: Array,
    *,
    weight: float = 1.0,
    alpha: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns `-cos(a_i, b_i) + weight * sum over the kept negatives of cos(a_i, b_k)`, the loss without hardness.

    Args:
        a: float [N, D], anchors; need not be normalised.
        b: float [N, D], `b[i]` belongs to `a[i]`; the others are its negatives.
        weight: of the negatives.
        alpha: in (0, 1], share of the hardest negatives that is kept (the paper's hard simple loss).
        where: bool [N], real pairs.
        axis_name: mapped axis over which the pairs are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `a`; no pair gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> float(jax.jit(simple_contrastive_loss)(np.eye(3), np.eye(3)))
        -1.0

    Source:
        Wang, Liu, arXiv 2012.09740, equations 6 and 9.
    """
    keep = _checked_pairs(a, b, where, 1.0, alpha)
    terms = rows_mixed(_simple_terms)(a, b, keep, weight=weight, alpha=alpha, axis_name=axis_name)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=a.dtype)


def relative_penalty(scores: Array, *, temperature: float | Array, where: Array | None = None) -> Array:
    """Returns the share of the positive's gradient that each negative receives: `softmax(scores / temperature)`.

    Args:
        scores: float [..., N], an anchor's similarities.
        temperature: > 0.
        where: bool [N] or [..., N], which of them are negatives; the others have 0.

    Returns:
        Shape and dtype of `scores`; sums to 1, or is 0 without negatives.

    Raises:
        ValueError: `temperature` is not positive or `where` does not fit.

    Example:
        >>> penalty = jax.jit(lambda scores, where: relative_penalty(scores, temperature=0.1, where=where))
        >>> penalty(jnp.array([0.9, 0.9, 0.1]), jnp.array([True, True, False])).tolist()
        [0.5, 0.5, 0.0]

    Source:
        Wang, Liu, arXiv 2012.09740, equation 5.
    """
    wide = scores.astype(compute_dtype(scores))
    return masked_softmax(wide / temperature, _negatives(scores, temperature, where)).astype(scores.dtype)


def penalty_entropy(scores: Array, *, temperature: float | Array, where: Array | None = None) -> Array:
    """Returns the entropy of `relative_penalty`, in nats: from 0 (one negative takes all) to log N (all alike).

    Args:
        scores: float [..., N], an anchor's similarities.
        temperature: > 0.
        where: bool [N] or [..., N], which of them are negatives.

    Returns:
        float [...] in the dtype of `scores`; 0 without negatives.

    Raises:
        ValueError: `temperature` is not positive or `where` does not fit.

    Example:
        >>> entropy = jax.jit(lambda scores: penalty_entropy(scores, temperature=1.0))
        >>> round(entropy(jnp.zeros(4)).item(), 4)  # log 4
        1.3863

    Source:
        Wang, Liu, arXiv 2012.09740, section 3.2.
    """
    wide = scores.astype(compute_dtype(scores))
    share = masked_softmax(wide / temperature, _negatives(scores, temperature, where))
    some = share > 0
    entropy = -jnp.sum(jnp.where(some, share * jnp.log(jnp.where(some, share, 1.0)), 0.0), axis=-1)
    return entropy.astype(scores.dtype)


def uniformity(embeddings: Array, *, t: float = 2.0, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns `log mean over pairs of exp(-t |f(x) - f(y)|^2)` of unit embeddings: 0 if all are one, lower if spread.

    Args:
        embeddings: float [N, D]; need not be normalised.
        t: > 0.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: pairs across all shards.

    Returns:
        Scalar in the accumulation dtype; 0 with fewer than two examples.

    Raises:
        ValueError: a shape does not fit, or `t` is not positive.

    Example:
        >>> round(jax.jit(uniformity)(jnp.array([[1.0, 0.0], [0.0, 1.0]])).item(), 4)
        -4.0

    Source:
        Wang, Isola, arXiv 2005.10242; t = 2 as in Wang, Liu, arXiv 2012.09740 (who plot the negative).
    """
    if not t > 0:
        raise ValueError(f"t={t} must be positive")
    keep = _checked_rows(embeddings, where)
    return rows_mixed(_uniformity)(embeddings, keep, t=t, axis_name=axis_name)


def tolerance(embeddings: Array, labels: Array, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the mean cosine between different examples of one class: how much similar examples are left together.

    Args:
        embeddings: float [N, D]; need not be normalised.
        labels: int [N]; -1 is unlabelled and takes no part.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: pairs across all shards.

    Returns:
        Scalar in the accumulation dtype; 0 without such a pair.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> float(jax.jit(tolerance)(jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 1])))
        1.0

    Source:
        Wang, Liu, arXiv 2012.09740, equation 7.
    """
    keep = _checked_rows(embeddings, where)
    if labels.shape != keep.shape:
        raise ValueError(f"labels has shape {labels.shape}, expected {keep.shape}, a label for each embedding")
    return rows_mixed(_tolerance)(embeddings, labels, keep & (labels >= 0), axis_name=axis_name)


def alignment(
    a: Array,
    b: Array,
    *,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the mean squared distance of the unit embeddings of two views: `E |f(x) - f(x+)|^2`.

    Args:
        a: float [N, D]; need not be normalised.
        b: float [N, D], of the same examples.
        where: bool [N], real pairs.
        axis_name: mapped axis over which the pairs are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype, or `[N]` in the dtype of `a`; no pair gives 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(jax.jit(alignment)(np.eye(2), np.eye(2)[::-1]))
        2.0

    Source:
        Wang, Isola, arXiv 2005.10242, with exponent 2.
    """
    keep = _checked_pairs(a, b, where, 1.0, 1.0)
    terms = jnp.sum(jnp.square(unit_rows(a, keep) - unit_rows(b, keep)), axis=1)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=a.dtype)


def _scores(a, b, keep, alpha, axis_name):
    """Returns cosines [N, M] to the second view of all shards, the own column, and the negatives kept."""
    a, b = unit_rows(a, keep), unit_rows(b, keep)
    others, exist = gather_rows(b, axis_name), gather_rows(keep, axis_name)
    scores = jnp.matmul(a, others.T, precision=jax.lax.Precision.HIGHEST)
    total = others.shape[0]
    own = own_columns(a.shape[0], total, axis_name)
    negative = exist[None, :] & jnp.logical_not(own)
    if alpha < 1:
        # The numbers are counted on the host: in float32, 0.1 * 10 is above 1. The rounding undoes it in float64.
        kept = np.array([math.ceil(round(alpha * n, 9)) for n in range(total + 1)], np.int32)
        number = jnp.asarray(kept)[jnp.sum(negative, axis=1)]
        ranked = jnp.sort(jnp.where(negative, scores, -2.0), axis=1, descending=True)
        threshold = jnp.take_along_axis(ranked, jnp.maximum(number - 1, 0)[:, None], axis=1)
        negative = negative & (scores >= jax.lax.stop_gradient(threshold))
    return scores, own, negative


def _hard_terms(a, b, keep, *, alpha, temperature, axis_name):
    scores, own, negative = _scores(a, b, keep, alpha, axis_name)
    logits = scores / temperature
    return masked_logsumexp(logits, own | negative) - jnp.sum(jnp.where(own, logits, 0.0), axis=1)


def _simple_terms(a, b, keep, *, weight, alpha, axis_name):
    scores, own, negative = _scores(a, b, keep, alpha, axis_name)
    return jnp.sum(jnp.where(own, -scores, jnp.where(negative, weight * scores, 0.0)), axis=1)


def _pairs(embeddings, keep, axis_name):
    """Returns cosines [N, M] to all shards' embeddings and which of them are pairs of two different examples."""
    unit = unit_rows(embeddings, keep)
    others, exist = gather_rows(unit, axis_name), gather_rows(keep, axis_name)
    own = own_columns(unit.shape[0], others.shape[0], axis_name)
    scores = jnp.matmul(unit, others.T, precision=jax.lax.Precision.HIGHEST)
    return scores, unit, others, keep[:, None] & exist[None, :] & jnp.logical_not(own)


def _uniformity(embeddings, keep, *, t, axis_name):
    scores, unit, others, pair = _pairs(embeddings, keep, axis_name)
    length = lambda x: jnp.sum(x * x, axis=1)
    distance = length(unit)[:, None] + length(others)[None, :] - 2 * scores  # a zero vector has no length 1
    near = jnp.exp(-t * jnp.where(pair, distance, 0.0))
    count = all_sum(jnp.sum(pair, dtype=near.dtype), axis_name)
    mean = safe_divide(all_sum(masked_sum(near, pair), axis_name), count)
    return jnp.log(jnp.where(count > 0, mean, 1.0))


def _tolerance(embeddings, labels, keep, *, axis_name):
    scores, _, _, pair = _pairs(embeddings, keep, axis_name)
    pair = pair & (labels[:, None] == gather_rows(labels, axis_name)[None, :])
    count = all_sum(jnp.sum(pair, dtype=scores.dtype), axis_name)
    return safe_divide(all_sum(masked_sum(scores, pair), axis_name), count)


def _negatives(scores: Array, temperature: float | Array, where: Array | None) -> Array:
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if where is not None and where.shape not in (scores.shape, scores.shape[-1:]):
        raise ValueError(f"where has shape {where.shape}, expected {scores.shape} or {scores.shape[-1:]}")
    where = jnp.ones(scores.shape, bool) if where is None else where
    return jnp.broadcast_to(where.reshape((1,) * (scores.ndim - where.ndim) + where.shape), scores.shape)


def _checked_pairs(a, b, where, temperature, alpha):
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape [N, D], got {a.shape} and {b.shape}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} must be above 0 and at most 1")
    return checked_where(where, a.shape[0], temperature)


def _checked_rows(embeddings, where):
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got {embeddings.shape}")
    return checked_where(where, embeddings.shape[0])
