"""Clustering of a fixed set of rows, as one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def kmeans(
    key: Array,
    x: Array,
    *,
    num_clusters: int,
    num_starts: int = 1,
    max_steps: int = 300,
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Returns the clusters that Lloyd's algorithm finds from k-means++ seeds.

    Seeds: the first is a row drawn uniformly, each next one a row drawn with probability `~ min_c ||x_i - c||^2`. Then,
    until no label changes: `label_i = argmin_c ||x_i - c||^2` (the lower number on a tie), `c = mean of its rows`.

    A cluster without rows keeps its last centroid, so every centroid is finite; where fewer than `num_clusters` rows
    are distinct, surplus seeds are rows drawn again, and their clusters are empty. Without any row the centroids are 0.
    No gradient passes through.

    Args:
        key: draws the seeds.
        x: float [N, D].
        num_clusters: K >= 1.
        num_starts: independent sets of seeds; the clustering with the lowest inertia is returned.
        max_steps: Lloyd steps at most.
        where: bool [N], rows to cluster.

    Returns:
        `labels` int32 [N], -1 where masked; `centroids` [K, D] in the dtype of `x`; `inertia` [], the sum of the
        squared distances to the own centroid, in the accumulation dtype.

    Raises:
        ValueError: `x` is not [N, D], `where` does not fit, or a number is below 1.

    Example:
        >>> x = jnp.array([[0.0], [0.1], [5.0], [5.1]])
        >>> labels, centroids, _ = kmeans(jax.random.key(0), x, num_clusters=2)
        >>> bool(labels[0] == labels[1]), sorted(round(c, 2) for c in centroids[:, 0].tolist())
        (True, [0.05, 5.05])

    Source:
        Arthur, Vassilvitskii, k-means++: The Advantages of Careful Seeding, SODA 2007 (one candidate a seed).
        Reconstructed: empty clusters and the mask.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [N, D], got {x.shape}")
    if where is not None and where.shape != x.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:1]}")
    if min(num_clusters, num_starts, max_steps) < 1:
        raise ValueError(
            f"num_clusters={num_clusters}, num_starts={num_starts} and max_steps={max_steps} must be at least 1"
        )
    keep = jnp.ones(x.shape[0], bool) if where is None else where
    x = jax.lax.stop_gradient(x)
    return rows_mixed(_kmeans)(key, x, keep, clusters=num_clusters, starts=num_starts, max_steps=max_steps)


def _kmeans(key, x, keep, *, clusters, starts, max_steps):
    dtype = x.dtype
    wide = zero_where_false(x, keep).astype(compute_dtype(x))
    centre = masked_mean(wide, keep, axis=0)
    # Distances are taken about the mean, where |x|^2 - 2 x c + |c|^2 cancels least.
    wide = zero_where_false(wide - centre[None], keep)

    def run(key):
        return _lloyd(wide, keep, _seeds(key, wide, keep, clusters), max_steps)

    if starts == 1:
        labels, centroids, inertia = run(key)
    else:
        labels, centroids, inertia = jax.vmap(run)(jax.random.split(key, starts))
        best = jnp.argmin(inertia)
        labels, centroids, inertia = labels[best], centroids[best], inertia[best]
    some = jnp.any(keep)
    centroids = jnp.where(some, centroids + centre[None], jnp.zeros_like(centroids))
    return jnp.where(keep, labels, -1), centroids.astype(dtype), inertia


def _seeds(key, x, keep, clusters):
    """Returns k-means++ seeds [K, D]; a draw is where the running sum of the weights passes a uniform number."""
    uniform = keep.astype(x.dtype)

    def draw(weights, u):
        weights = jnp.where(jnp.sum(weights) > 0, weights, uniform)
        total = jnp.cumsum(weights)
        row = jnp.sum(total <= u * total[-1])
        return x[jnp.minimum(row, x.shape[0] - 1)]

    def step(nearest, u):
        seed = draw(nearest, u)
        away = jnp.where(keep, jnp.sum(jnp.square(x - seed[None]), axis=-1), 0.0)
        return jnp.minimum(nearest, away), seed

    draws = jax.random.uniform(key, (clusters,), x.dtype)
    first = draw(uniform, draws[0])
    nearest = jnp.where(keep, jnp.sum(jnp.square(x - first[None]), axis=-1), 0.0)
    _, others = jax.lax.scan(step, nearest, draws[1:])
    return jnp.concatenate([first[None], others])


def _lloyd(x, keep, centroids, max_steps):
    count = centroids.shape[0]

    def assign(centroids):
        product = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
        square = jnp.sum(jnp.square(centroids), axis=-1)[None] - 2 * product
        return jnp.argmin(square, axis=-1).astype(jnp.int32)

    def update(labels, centroids):
        member = zero_where_false(jax.nn.one_hot(labels, count, dtype=x.dtype), keep)
        number = jnp.sum(member, axis=0)[:, None]
        mean = safe_divide(jnp.matmul(member.T, x, precision=jax.lax.Precision.HIGHEST), number)
        return jnp.where(number > 0, mean, centroids)

    def body(state):
        step, labels, centroids, _ = state
        centroids = update(labels, centroids)
        new = assign(centroids)
        return step + 1, new, centroids, jnp.any(keep & (new != labels))

    labels = assign(centroids)
    start = (jnp.zeros_like(labels[0]), labels, centroids, jnp.any(keep))
    _, labels, centroids, _ = jax.lax.while_loop(lambda s: (s[0] < max_steps) & s[3], body, start)
    away = jnp.sum(jnp.square(x - centroids[labels]), axis=-1)
    return labels, centroids, jnp.sum(jnp.where(keep, away, 0.0))
