"""Unsupervised Manifold Linearizing and Clustering.

MLC, 2023, arXiv 2301.01805. Cluster data near several manifolds and make each a linear subspace, at once: maximise the
rate reduction over the features Z and over a doubly stochastic membership with one soft cluster for each sample, so
that nobody has to know their number. Both come from heads on one network; spectral clustering reads the result.

    S      = |C C^T|  of normalised cluster-head outputs C
    Gamma  = argmin over doubly stochastic G of  -<S, G> + eta <G, log G>            (Sinkhorn; rows sum to 1)
    loss   = -R(Z) + weight Rc(Z, Gamma) + penalty / 2 ||Gamma||^2                   (see `rate_reduction.py`)

Training: first Z alone, with augmentations (`total_coding_rate_loss`); then the feature head's parameters are copied
into the cluster head, and both learn from `mlc_loss`. A new sample goes to the nearest centroid in C.

Constants are those of the group's later code LeslieTrue/CPP (the paper's own is not public here). Reconstructed: three
full Sinkhorn iterations, rows last, where that code takes two and a half and stops the gradient at the columns'
potentials; the absolute value of C C^T.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.information.rate_reduction import rate_reduction_loss
from jaxlab.ops.clustering import kmeans
from jaxlab.ops.collectives import all_mean, gather_rows
from jaxlab.ops.masked import compute_dtype, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.transport import sinkhorn


def mlc_loss(
    features: Array,
    codes: Array,
    *,
    eps: float = 0.1,
    weight: float = 1.0,
    penalty: float = 0.05,
    eta: float = 0.175,
    iterations: int = 3,
    absolute: bool = True,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns `-R(Z) + weight Rc(Z, Gamma) + penalty / 2 ||Gamma||^2` with the membership that the codes imply.

    Args:
        features: float [N, D], of the feature head; need not be normalised.
        codes: float [N, E], of the cluster head; need not be normalised.
        eps: > 0, squared error of the coding rates.
        weight: of the parts' rate.
        penalty: of the squared norm of the membership, which keeps it soft.
        eta: see `mlc_membership`.
        iterations: see `mlc_membership`.
        absolute: see `mlc_membership`.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread: the membership is between those of all shards, and every
            shard computes all of it.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); 0 without any row. Memory is N D^2.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = jnp.repeat(jnp.eye(3), 2, axis=0)
        >>> loss = jax.jit(lambda codes: mlc_loss(z, codes))
        >>> bool(loss(z) < loss(z[jnp.array([0, 2, 4, 1, 3, 5])]))
        True

    Source:
        Ding, Tong, Chan, Dai, Ma, Haeffele, arXiv 2301.01805; code LeslieTrue/CPP (constants).
    """
    if features.ndim != 2 or codes.ndim != 2 or features.shape[0] != codes.shape[0]:
        raise ValueError(f"features and codes must be [N, D] and [N, E], got {features.shape} and {codes.shape}")
    keep = jnp.ones(features.shape[0], bool) if where is None else where

    def run(z, c, keep):
        z, c, keep = (gather_rows(a, axis_name) for a in (z, c, keep))
        wide = compute_dtype(z, c)
        member = mlc_membership(c.astype(wide), eta=eta, iterations=iterations, absolute=absolute, where=keep)
        loss = rate_reduction_loss(z.astype(wide), member, eps=eps, weight=weight, where=keep)
        return all_mean(loss + penalty / 2 * jnp.sum(member * member), axis_name)

    return rows_mixed(run)(features, codes, keep)


def mlc_membership(
    codes: Array, *, eta: float = 0.175, iterations: int = 3, absolute: bool = True, where: Array | None = None
) -> Array:
    """Returns the doubly stochastic membership between samples, N times the entropic plan of their similarities.

    Args:
        codes: float [N, E], of the cluster head; need not be normalised.
        eta: > 0, entropy; towards 0 each sample keeps to itself, towards infinity all are one cluster.
        iterations: >= 1, of Sinkhorn; rows are exact, columns approach it.
        absolute: whether opposite codes belong together.
        where: bool [N], real rows; the others are 0.

    Returns:
        float [N, N] in the dtype of `codes`; rows of real samples sum to 1.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> jax.jit(mlc_membership)(jnp.ones((2, 3))).round(3).tolist()
        [[0.5, 0.5], [0.5, 0.5]]

    Source:
        Ding et al., arXiv 2301.01805; code LeslieTrue/CPP, model/sink_distance.py (eta 0.175).
    """
    if codes.ndim != 2:
        raise ValueError(f"codes must be [N, E], got {codes.shape}")
    if where is not None and where.shape != codes.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {codes.shape[:1]}")
    keep = jnp.ones(codes.shape[0], bool) if where is None else where

    def run(c, keep):
        unit = safe_normalize(zero_where_false(c, keep).astype(compute_dtype(c)))
        similarity = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
        similarity = jnp.abs(similarity) if absolute else similarity
        # The plan's columns are exact, its rows nearly; the similarity is symmetric, so its transpose is as good.
        plan = sinkhorn(-similarity, epsilon=eta, iterations=iterations, where=keep, kv_where=keep).T
        return (plan * jnp.sum(keep, dtype=plan.dtype)).astype(codes.dtype)

    return rows_mixed(run)(codes, keep)


def spectral_clustering(
    affinity: Array, *, num_clusters: int, key: Array, num_starts: int = 10, where: Array | None = None
) -> Array:
    """Returns clusters of a graph: k-means on the normalised rows of the leading eigenvectors of `D^-1/2 W D^-1/2`.

    Args:
        affinity: float >= 0 [N, N]; made symmetric as `(W + W^T) / 2`.
        num_clusters: K, between 1 and N.
        key: of k-means.
        num_starts: of k-means.
        where: bool [N], real rows.

    Returns:
        int32 [N], -1 where masked; no gradient.

    Raises:
        ValueError: shapes do not fit or `num_clusters` is out of range.

    Example:
        >>> w = jnp.kron(jnp.eye(2), jnp.ones((3, 3)))
        >>> labels = jax.jit(lambda w: spectral_clustering(w, num_clusters=2, key=jax.random.key(0)))(w)
        >>> bool(labels[0] == labels[2]), bool(labels[0] == labels[3])
        (True, False)

    Source:
        Ng, Jordan, Weiss, On spectral clustering (2001).
    """
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1]:
        raise ValueError(f"affinity must be [N, N], got {affinity.shape}")
    rows = affinity.shape[0]
    if not 1 <= num_clusters <= rows:
        raise ValueError(f"num_clusters={num_clusters} must be between 1 and the {rows} rows")
    if where is not None and where.shape != (rows,):
        raise ValueError(f"where has shape {where.shape}, expected ({rows},)")
    keep = jnp.ones(rows, bool) if where is None else where

    def run(w, keep, key):
        w = jnp.where(keep[:, None] & keep[None, :], w, jnp.zeros((), w.dtype)).astype(compute_dtype(w))
        w = jnp.maximum(w + w.T, 0) / 2
        root = jnp.sqrt(jnp.sum(w, axis=1))
        _, vectors = jnp.linalg.eigh(safe_divide(w, root[:, None] * root[None, :]))
        embedding = safe_normalize(vectors[:, -num_clusters:])
        return kmeans(key, embedding, num_clusters=num_clusters, num_starts=num_starts, where=keep)[0]

    return rows_mixed(run)(jax.lax.stop_gradient(affinity), keep, key)
