"""Sorting that has a gradient: networks whose comparisons are soft."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed


def odd_even_sort(
    x: Array, *, steepness: float = 1.0, kind: str = "cauchy", where: Array | None = None
) -> tuple[Array, Array]:
    """Sorts along the last axis with a differentiable odd-even transposition network.

    Layer l = 0..n-1 compares the neighbours (j, j + 1), j = l mod 2, l mod 2 + 2, ..., of values a and b:

        alpha = f(steepness * (b - a)),  left' = alpha a + (1 - alpha) b,  right' = (1 - alpha) a + alpha b

    and the columns of P, which starts as the identity, are mixed alike, so that `sorted = x P`. f goes from 0 to 1:

        cauchy        arctan(v) / pi + 1/2
        logistic      1 / (1 + exp(-v))
        logistic_phi  logistic of v / (|b - a| + 1e-10)^(1/4)
        optimal       1/2 + v for |v| <= 1/4, otherwise 1 - 1 / (16 v) for v > 0 and -1 / (16 v) for v < 0

    Args:
        x: float [..., n].
        steepness: > 0; towards infinity the network sorts exactly, and its gradient vanishes.
        kind: "cauchy", "logistic", "logistic_phi" or "optimal".
        where: bool [..., n], entries to sort; the others take no part: the kept ones give exactly what they give
            without them, and stand before them in the result.

    Returns:
        `x_sorted [..., n]`, ascending, and `P [..., n, n]` (rows: entries, columns: ranks), doubly stochastic, both in
        the dtype of `x`. With m kept entries the ranks m.. hold 0, as do the rows of P of the entries left out.

    Raises:
        ValueError: `x` is a scalar, `where` has another shape, `steepness` is not positive, or `kind` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> ranked, P = odd_even_sort(jnp.array([3.0, 1.0, 2.0]), steepness=1e6)
        >>> ranked.round(2).tolist(), P.argmax(-1).tolist()
        ([1.0, 2.0, 3.0], [2, 0, 1])

    Source:
        Petersen et al., Differentiable Sorting Networks (arXiv 2105.04019) and Monotonic Differentiable Sorting
        Networks (arXiv 2203.09630); code Felix-Petersen/diffsort, whose 1e-10 it is. Reconstructed: the mask.
    """
    if x.ndim < 1:
        raise ValueError(f"x must have at least one axis, got shape {x.shape}")
    if where is not None and where.shape != x.shape:
        raise ValueError(f"where has shape {where.shape}, expected that of x, {x.shape}")
    if not steepness > 0:
        raise ValueError(f"steepness={steepness} must be positive")
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} must be one of {sorted(_KINDS)}")
    keep = jnp.ones(x.shape, bool) if where is None else where
    return rows_mixed(_network)(x, keep, steepness=steepness, kind=kind, masked=where is not None)


def _network(x: Array, keep: Array, *, steepness: float, kind: str, masked: bool) -> tuple[Array, Array]:
    dtype, n = x.dtype, x.shape[-1]
    x = jnp.where(keep, x, jnp.zeros((), dtype)).astype(compute_dtype(x))
    count = jnp.sum(keep, axis=-1, keepdims=True)
    # Kept entries move to the front, in order; P starts as that permutation. Derived from x, so that inside shard_map
    # the loop's carry varies over the same mesh axes as what the loop makes of it.
    order = jnp.argsort(jnp.logical_not(keep), axis=-1, stable=True) if masked else jnp.zeros_like(x, int) + _last(x)
    columns = (order[..., None, :] == _last(x)[..., :, None]).astype(x.dtype) + jnp.zeros_like(x)[..., None]
    state = (jnp.take_along_axis(x, order, axis=-1) if masked else x, columns)

    def layer(state, offset, number):
        x, columns = state
        pairs = (n - offset) // 2
        if pairs == 0:
            return state
        middle = slice(offset, offset + 2 * pairs)
        x_pairs = x[..., middle].reshape(*x.shape[:-1], pairs, 2)
        gap = x_pairs[..., 1] - x_pairs[..., 0]
        alpha, beta = _KINDS[kind](gap, steepness), _KINDS[kind](-gap, steepness)
        if masked:
            # A pair takes part if both are kept, and a list of m entries has m layers, however long its padding.
            right = jnp.arange(pairs).reshape((1,) * (x.ndim - 1) + (pairs,)) * 2 + offset + 1
            live = (right < count) & (number < count)
            alpha, beta = jnp.where(live, alpha, 1.0), jnp.where(live, beta, 0.0)
        x = _put(x, offset, _mix(x_pairs, alpha, beta))
        column_pairs = columns[..., middle].reshape(*columns.shape[:-1], pairs, 2)
        return x, _put(columns, offset, _mix(column_pairs, alpha[..., None, :], beta[..., None, :]))

    def two_layers(state, step):
        return layer(layer(state, 0, 2 * step), 1, 2 * step + 1), None

    state, _ = jax.lax.scan(two_layers, state, jnp.arange(n // 2))
    x, columns = layer(state, 0, n - 1) if n % 2 else state
    if masked:
        columns = jnp.where(keep[..., None] & (_last(x) < count)[..., None, :], columns, 0.0)
    return x.astype(dtype), columns.astype(dtype)


def _last(x: Array) -> Array:
    return jnp.arange(x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,))


def _mix(pairs: Array, alpha: Array, beta: Array) -> Array:
    left, right = pairs[..., 0], pairs[..., 1]
    return jnp.stack([alpha * left + beta * right, beta * left + alpha * right], axis=-1)


def _put(x: Array, offset: int, pairs: Array) -> Array:
    flat = pairs.reshape(*pairs.shape[:-2], -1)
    return jnp.concatenate([x[..., :offset], flat, x[..., offset + flat.shape[-1] :]], axis=-1)


def _optimal(gap: Array, steepness: float) -> Array:
    v = steepness * gap
    tail = 1 / (16 * jnp.maximum(jnp.abs(v), 0.25))
    return jnp.where(jnp.abs(v) <= 0.25, 0.5 + v, jnp.where(v > 0, 1 - tail, tail))


# Each is asked for both f(v) and f(-v), because 1 - f(v) would cancel to 0 in the tails; arctan2 keeps Cauchy's exact.
_KINDS = {
    "cauchy": lambda gap, steepness: jnp.arctan2(jnp.ones_like(gap), -steepness * gap) / jnp.pi,
    "logistic": lambda gap, steepness: jax.nn.sigmoid(steepness * gap),
    "logistic_phi": lambda gap, steepness: jax.nn.sigmoid(steepness * gap / (jnp.abs(gap) + 1e-10) ** 0.25),
    "optimal": _optimal,
}
