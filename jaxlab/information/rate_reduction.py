"""Coding rate and its reduction: how many nats a set of features takes, whole and in parts.

Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction (MCR2, 2020,
arXiv 2006.08558). What the family's clustering method stands on. For N features z_i of unit length in R^D, up to a
squared error eps:

    R(Z)       = 1/2 logdet( I + D / (N eps) Z^T Z )
    Rc(Z, G)   = 1/(2N) sum_j t_j logdet( I + D / (t_j eps) Z^T diag(g_j) Z ),   g_j column j of G [N, K], t_j its sum
    reduction  = R - Rc >= 0 if the rows of the membership G sum to 1

eps stands where MCR2 has the square of its precision. Features are normalised inside.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, global_mean
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def coding_rate(
    features: Array, *, eps: float = 0.1, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns the coding rate `1/2 logdet(I + D / (N eps) Z^T Z)` of the normalised features.

    Args:
        features: float [N, D]; need not be normalised, a zero vector stays one.
        eps: > 0, squared error allowed.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 without any row.

    Raises:
        ValueError: shapes do not fit or `eps` is not positive.

    Example:
        >>> round(float(jax.jit(coding_rate)(jnp.eye(2))), 4)  # logdet of 11 I, halved
        2.3979

    Source:
        Yu, Chan, You, Song, Ma, arXiv 2006.08558.
    """
    keep = _checked(features, eps, where)

    def run(z, keep):
        z = _unit(z, keep)
        count = jnp.maximum(all_sum(jnp.sum(keep, dtype=z.dtype), axis_name), 1)
        gram = all_sum(_product(z, z), axis_name)
        return _log_det(z.shape[1] / (count * eps) * gram) / 2

    return rows_mixed(run)(features, keep)


def class_coding_rate(
    features: Array,
    membership: Array,
    *,
    eps: float = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the rate of the parts, `1/(2N) sum_j t_j logdet(I + D / (t_j eps) Z^T diag(g_j) Z)`.

    Args:
        features: float [N, D]; need not be normalised.
        membership: float >= 0 [N, K], share of each row in each part; rows sum to 1.
        eps: > 0, squared error allowed.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 without any row. Memory is K D^2.

    Raises:
        ValueError: shapes do not fit or `eps` is not positive.

    Example:
        >>> z, alone = jnp.eye(2), jnp.eye(2)  # a part for each row: one direction takes its bits, the other none
        >>> round(float(jax.jit(class_coding_rate)(z, alone)), 4)
        1.5223

    Source:
        Yu, Chan, You, Song, Ma, arXiv 2006.08558.
    """
    keep = _checked(features, eps, where)
    if membership.ndim != 2 or membership.shape[0] != features.shape[0]:
        raise ValueError(f"membership must be [{features.shape[0]}, K], got {membership.shape}")

    def run(z, member, keep):
        z = _unit(z, keep)
        member = zero_where_false(member, keep).astype(z.dtype)
        count = jnp.maximum(all_sum(jnp.sum(keep, dtype=z.dtype), axis_name), 1)
        size = all_sum(jnp.sum(member, axis=0), axis_name)
        weighted = member.T[:, :, None] * z[None]
        grams = all_sum(jnp.matmul(z.T[None], weighted, precision=jax.lax.Precision.HIGHEST), axis_name)
        scale = z.shape[1] / (jnp.maximum(size, 1e-8) * eps)
        return jnp.sum(size * _log_det(scale[:, None, None] * grams)) / (2 * count)

    return rows_mixed(run)(features, membership, keep)


def rate_reduction_loss(
    features: Array,
    membership: Array,
    *,
    eps: float = 0.1,
    weight: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns `-R(Z) + weight Rc(Z, G)`: the whole is to be large and the parts small (MCR2).

    Args:
        features: float [N, D].
        membership: float >= 0 [N, K]; one-hot labels for supervised training.
        eps: > 0, squared error allowed.
        weight: of the parts, 1 in the paper.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 without any row.

    Raises:
        ValueError: shapes do not fit or `eps` is not positive.

    Example:
        >>> z, one = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), jnp.repeat(jnp.eye(2), 2, axis=0)
        >>> loss = jax.jit(lambda member: rate_reduction_loss(z, member))
        >>> bool(loss(one) < loss(one[jnp.array([0, 2, 1, 3])]))
        True

    Source:
        Yu, Chan, You, Song, Ma, arXiv 2006.08558.
    """
    options = {"eps": eps, "where": where, "axis_name": axis_name}
    return weight * class_coding_rate(features, membership, **options) - coding_rate(features, **options)


def total_coding_rate_loss(
    views: Array, *, eps: float = 0.1, weight: float = 10.0, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns the loss of self-supervised learning by coding rate: views agree, and their means spread.

    `-R(mean over views) - weight mean_v mean_i cos(z_vi, mean_i)`, all of unit length.

    Args:
        views: float [V, N, D], V >= 1 views of each example.
        eps: > 0, squared error allowed.
        weight: of the agreement.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in the accumulation dtype; 0 without any example.

    Raises:
        ValueError: shapes do not fit or `eps` is not positive.

    Example:
        >>> z = jnp.eye(3)
        >>> loss = jax.jit(lambda other: total_coding_rate_loss(jnp.stack([z, other])))
        >>> bool(loss(z) < loss(z[::-1]))
        True

    Source:
        Tong et al., EMP-SSL, arXiv 2304.03977. Reconstructed: the rate of the mean instead of the mean of rates, and
        the weight.
    """
    if views.ndim != 3:
        raise ValueError(f"views must be [V, N, D], got {views.shape}")
    keep = _checked(views[0], eps, where)
    wide = compute_dtype(views)
    clean = jnp.where(keep[None, :, None], views, jnp.zeros((), views.dtype)).astype(wide)
    unit = safe_normalize(clean)
    mean = safe_normalize(jnp.mean(unit, axis=0))
    agree = global_mean(jnp.mean(jnp.sum(unit * mean[None], axis=-1), axis=0), keep, axis_name=axis_name)
    return -coding_rate(mean, eps=eps, where=keep, axis_name=axis_name) - weight * agree


def coding_length(
    features: Array, labels: Array, *, num_clusters: int, eps: float = 0.1, where: Array | None = None
) -> Array:
    """Returns how many nats clusters and their features take; the best number of clusters has the least.

    `sum_j (n_j + D) / 2 logdet(I + D / (n_j eps) Z_j^T Z_j) + n_j log(N / n_j)` over clusters with rows.

    Args:
        features: float [N, D]; need not be normalised.
        labels: int [N] in 0 .. K - 1; -1 takes no part.
        num_clusters: K.
        eps: > 0, squared error allowed.
        where: bool [N], real rows.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 without any row.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = jnp.repeat(jnp.eye(2), 20, axis=0)
        >>> length = jax.jit(lambda labels: coding_length(z, labels, num_clusters=2))
        >>> bool(length(jnp.arange(40) // 20) < length(jnp.zeros(40, int)))
        True

    Source:
        Ma, Derksen, Hong, Wright (2007); code LeslieTrue/CPP, loss/coding_length.py.
    """
    keep = _checked(features, eps, where)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {features.shape[:1]}")
    if num_clusters < 1:
        raise ValueError(f"num_clusters={num_clusters} must be at least 1")

    def run(z, labels, keep):
        keep = keep & (labels >= 0)
        z = _unit(z, keep)
        member = zero_where_false(jax.nn.one_hot(labels, num_clusters, dtype=z.dtype), keep)
        size, total = jnp.sum(member, axis=0), jnp.sum(keep, dtype=z.dtype)
        grams = jnp.matmul(z.T[None], member.T[:, :, None] * z[None], precision=jax.lax.Precision.HIGHEST)
        some = jnp.maximum(size, 1)
        rate = _log_det(z.shape[1] / (some * eps)[:, None, None] * grams)
        return jnp.sum((size + z.shape[1]) / 2 * rate + size * jnp.log(jnp.maximum(total, 1) / some))

    return rows_mixed(run)(features, labels, keep)


def _checked(features, eps, where) -> Array:
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], got {features.shape}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    if where is not None and where.shape != features.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {features.shape[:1]}")
    return jnp.ones(features.shape[:1], bool) if where is None else where


def _unit(z, keep):
    return safe_normalize(zero_where_false(z, keep).astype(compute_dtype(z)))


def _product(a, b):
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


def _log_det(gram):
    """Returns logdet(I + gram) of positive semi-definite matrices [..., D, D]."""
    root = jnp.linalg.cholesky(gram + jnp.eye(gram.shape[-1], dtype=gram.dtype)[(None,) * (gram.ndim - 2)])
    return 2 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
