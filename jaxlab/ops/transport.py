"""Entropic optimal transport: Sinkhorn's iteration in the log domain, and soft permutations made of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed


def sinkhorn(
    cost: Array,
    *,
    epsilon: float = 0.05,
    iterations: int = 100,
    row_marginal: Array | None = None,
    column_marginal: Array | None = None,
    where: Array | None = None,
    kv_where: Array | None = None,
) -> Array:
    """Returns the transport plan with the given marginals and the least cost, smoothed by its entropy.

    `P = argmin <P, cost> - epsilon H(P)` over P >= 0 with `P 1 = row_marginal` and `P^T 1 = column_marginal`, by
    alternating `f = log a - logsumexp_j(g - cost / epsilon)` and `g = log b - logsumexp_i(f - cost / epsilon)`. Columns
    are updated last: their sums are exact, row sums approach theirs with the iterations. Differentiable through the
    iterations, of which the backward keeps only f and g.

    Args:
        cost: float [..., n, m].
        epsilon: > 0, weight of the entropy, in units of the cost.
        iterations: >= 1, each an update of rows and of columns.
        row_marginal: float >= 0 [..., n] or [n]; None = uniform over the kept rows, sum 1.
        column_marginal: float >= 0 [..., m] or [m]; None = uniform over the kept columns, sum 1. Both must have the
            same sum; otherwise the columns' is met.
        where: bool [..., n] or [n], rows that exist; the others (and rows of marginal 0) take no part and are 0.
        kv_where: bool [..., m] or [m], columns that exist.

    Returns:
        float [..., n, m] in the dtype of `cost`; all 0 without rows or without columns.

    Raises:
        ValueError: a shape does not fit, or `epsilon` or `iterations` is out of range.

    Example:
        >>> plan = sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
        >>> plan.round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

    Source:
        Cuturi, Sinkhorn Distances, arXiv 1306.0895; in the log domain as Peyre and Cuturi, Computational Optimal
        Transport, arXiv 1803.00567, section 4.4. epsilon and iterations are common choices, not theirs.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    if cost.ndim < 2:
        raise ValueError(f"cost must be [..., n, m], got shape {cost.shape}")
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    rows = _side("row_marginal", row_marginal, "where", where, batch, n)
    columns = _side("column_marginal", column_marginal, "kv_where", kv_where, batch, m)
    run = rows_mixed(_transport)
    return run(*match_varying(cost, *rows, *columns), epsilon=float(epsilon), iterations=iterations)


def gumbel_sinkhorn(
    scores: Array,
    *,
    temperature: float | Array = 1.0,
    iterations: int | Array = 20,
    noise: float = 1.0,
    key: Array | None = None,
    max_iterations: int | None = None,
) -> Array:
    """Returns a soft permutation, a random one with a key: `Sinkhorn((scores + noise * Gumbel) / temperature)`.

    Each iteration normalises the rows of the exponential and then its columns. As the temperature falls and the
    iterations rise the result approaches the permutation that maximises the sum of the (noisy) scores.

    Args:
        scores: float [..., n, n].
        temperature: > 0, a number or a scalar array.
        iterations: >= 0, an int or an int scalar array (then with `max_iterations`).
        noise: factor of the Gumbel noise.
        key: for the noise; None = no noise.
        max_iterations: static upper bound of `iterations`, needed where that is an array.

    Returns:
        float [..., n, n] in the dtype of `scores`; columns sum to 1, rows nearly.

    Raises:
        ValueError: `scores` is not square, or an option is out of range.

    Example:
        >>> soft = gumbel_sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), temperature=0.1)
        >>> soft.round(3).tolist()
        [[0.0, 1.0], [1.0, 0.0]]

    Source:
        Mena et al., Learning Latent Permutations with Gumbel-Sinkhorn Networks, arXiv 1802.08665, section 3.
    """
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must be [..., n, n], got shape {scores.shape}")
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if isinstance(iterations, int):
        most = iterations
    elif max_iterations is None:
        raise ValueError("max_iterations is needed where iterations is an array")
    else:
        most = max_iterations
    if most < 1:
        raise ValueError(f"iterations={most} must be at least 1")
    dtype = compute_dtype(scores)
    log_plan = scores.astype(dtype)
    if key is not None and noise:
        log_plan = log_plan + noise * jax.random.gumbel(key, scores.shape, dtype)
    log_plan = log_plan / jnp.asarray(temperature, dtype)
    limit = jnp.asarray(iterations, jnp.int32)
    keep = jnp.ones(scores.shape, bool)
    zeros = jnp.zeros(scores.shape[:-1], dtype)
    run = rows_mixed(_doubly_stochastic)
    return run(*match_varying(log_plan, keep, zeros, limit), iterations=most).astype(scores.dtype)


def _side(name, marginal, mask_name, mask, batch, size):
    """Returns the marginal (or None) and the mask of one side, each over the whole batch."""
    shapes = ((size,), (*batch, size))
    for label, value in ((name, marginal), (mask_name, mask)):
        if value is not None and value.shape not in shapes:
            expected = f"({size},)" if not batch else f"({size},) or {shapes[1]}"
            raise ValueError(f"{label} has shape {value.shape}, expected {expected}")
    keep = jnp.ones(size, bool) if mask is None else jnp.asarray(mask)
    return marginal, keep


def _transport(cost, row_marginal, where, column_marginal, kv_where, *, epsilon, iterations):
    dtype = compute_dtype(cost)
    log_a, rows = _log_marginal(row_marginal, where, cost.shape[:-1], dtype)
    log_b, columns = _log_marginal(column_marginal, kv_where, (*cost.shape[:-2], cost.shape[-1]), dtype)
    keep = rows[..., :, None] & columns[..., None, :]
    log_kernel = jnp.where(keep, -cost.astype(dtype) / epsilon, jnp.zeros((), dtype))
    limit = jnp.zeros((), jnp.int32) + iterations
    log_plan = _iterate(log_kernel, keep, log_a, log_b, match_varying(limit, log_kernel)[0], iterations)
    return jnp.where(keep, jnp.exp(jnp.where(keep, log_plan, 0.0)), 0.0).astype(cost.dtype)


def _log_marginal(marginal, keep, shape, dtype):
    """Returns log marginals, 0 where nothing takes part, and what takes part."""
    keep = jnp.broadcast_to(keep.reshape((1,) * (len(shape) - keep.ndim) + keep.shape), shape)
    if marginal is None:
        count = jnp.maximum(jnp.sum(keep, axis=-1, keepdims=True, dtype=dtype), 1.0)
        return jnp.broadcast_to(-jnp.log(count), shape), keep
    marginal = marginal.reshape((1,) * (len(shape) - marginal.ndim) + marginal.shape)
    marginal = jnp.broadcast_to(marginal, shape).astype(dtype)
    keep = keep & (marginal > 0)
    return jnp.log(jnp.where(keep, marginal, 1.0)), keep


def _doubly_stochastic(log_plan, keep, zeros, limit, *, iterations):
    return jnp.exp(_iterate(log_plan, keep, zeros, zeros, limit, iterations))


def _iterate(log_kernel, keep, log_a, log_b, limit, iterations):
    """Returns the logarithm of the plan after the first `limit` of `iterations` updates of rows and columns."""

    @jax.checkpoint
    def update(potentials, i):
        f, g = potentials
        f_new = log_a - _logsumexp(log_kernel + g[..., None, :], keep, -1)
        g_new = log_b - _logsumexp(log_kernel + f_new[..., :, None], keep, -2)
        live = i < limit
        return jnp.where(live, f_new, f), jnp.where(live, g_new, g)

    start = (jnp.zeros_like(log_kernel[..., 0]), jnp.zeros_like(log_kernel[..., 0, :]))
    (f, g), _ = jax.lax.scan(lambda p, i: (update(p, i), None), start, jnp.arange(iterations))
    return log_kernel + f[..., :, None] + g[..., None, :]


def _logsumexp(x, keep, axis):
    """Returns log sum exp of what is kept along the axis, 0 where nothing is."""
    top = jax.lax.stop_gradient(jnp.max(jnp.where(keep, x, -jnp.inf), axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
    total = jnp.sum(jnp.where(keep, jnp.exp(jnp.where(keep, x - top, 0.0)), 0.0), axis=axis)
    some = jnp.any(keep, axis=axis)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + jnp.squeeze(top, axis), jnp.zeros_like(total))
