"""Wasserstein Dependency Measure for Representation Learning.

WDM and WPC, 2019, arXiv 1903.11780. Mutual information is large as soon as pairs can be told apart at all, so its
bounds need exp(I) samples and encoders keep the few factors that suffice. The Wasserstein distance instead asks HOW FAR
apart joint and product distribution are; a critic that may not be steep has to use every factor.

    I_W(x; y) = W1(p(x, y), p(x) p(y)) = sup over 1-Lipschitz f of E_p f - E_q f       (q = p(x) p(y))
    CPC       = -mean_i [ f(x_i, y_i) - log mean_j exp f(x_i, y_j) ]                      (minus the InfoNCE bound)
    WPC       = CPC + penalty_weight * mean_i ( ||grad f(xh_i, yh_i)|| - 1 )^2
    (xh, yh)  = e (x, y) + (1 - e) (x', y'),  e ~ U(0, 1),  (x', y') a pair of the product distribution

The gradient is by both inputs together. Critics must treat each example on its own (no batch normalisation).

Reconstructed: the weight 10 and the interpolation are those of WGAN-GP (arXiv 1704.00028), which the paper takes its
constraint from; the product pair of row i is (x_{i+1}, y_{i+2}), cyclically over the real rows; CPC subtracts log N, so
that a constant critic gives 0. `wasserstein_dependency` (exact, by assignment) serves to check estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.collectives import axis_index, axis_size, gather_rows
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_mean, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def wpc_loss(
    params: Any,
    critic: Callable[[Any, Array, Array], Array],
    x: Array,
    y: Array,
    *,
    key: Array,
    penalty_weight: float | Array = 10.0,
    one_sided: bool = False,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the loss of Wasserstein predictive coding: InfoNCE with a critic that is held to be 1-Lipschitz.

    `-mean_i [f_ii - log mean_j exp f_ij] + penalty_weight mean_i (||grad f(xh_i, yh_i)|| - 1)^2`.

    Args:
        params: of the critic, any pytree.
        critic: `critic(params, x, y)`, a scalar for ONE pair, without batch axes. It is mapped over all pairs; parts
            that depend on x alone or y alone (encoders) run once a row. Has to be finite at zeros if `where` is used.
        x: float [N, ...], in the space whose distances count (raw data in the paper).
        y: float [N, ...], `y[i]` belongs to `x[i]`, the others are its negatives.
        key: draws the points where the slope is measured; one number for each row (of all shards).
        penalty_weight: >= 0; 0 is InfoNCE.
        one_sided: whether only slopes above 1 are penalised.
        where: bool [N], real pairs.
        axis_name: mapped axis over which the pairs are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `x`. A single pair has
        its penalty alone; no pair gives 0.

    Raises:
        ValueError: shapes do not fit, inputs are not floating, the critic's result is not a scalar, or
            `penalty_weight` is negative.

    Example:
        >>> critic = lambda w, x, y: jnp.vdot(x * w, y)
        >>> x = 3 * jnp.eye(4)
        >>> loss = jax.jit(lambda y: wpc_loss(1.0, critic, x, y, key=jax.random.key(0), penalty_weight=0.0))
        >>> bool(loss(x) < loss(x[::-1]))
        True

    Source:
        Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, arXiv 1903.11780.
    """
    known = isinstance(penalty_weight, int | float)
    if known and not penalty_weight >= 0:
        raise ValueError(f"penalty_weight={penalty_weight} must not be negative")
    keep = _checked(params, critic, {"x": x, "y": y}, where)

    def run(params, x, y, keep, key):
        x, y = zero_where_false(x, keep), zero_where_false(y, keep)
        xs, ys, exist = (gather_rows(a, axis_name) for a in (x, y, keep))
        rows = axis_index(axis_name) * x.shape[0] + jnp.arange(x.shape[0])
        terms = _cpc_terms(params, critic, x, ys, exist, rows)
        if not (known and penalty_weight == 0):
            next_row = _next_real_row(exist)
            first = next_row[rows]
            pairs = (x, y, xs[first], ys[next_row[first]])
            draws = jax.random.uniform(key, exist.shape, terms.dtype)[rows]
            terms = terms + penalty_weight * _penalties(params, critic, *pairs, draws, one_sided)
        return terms

    terms = rows_mixed(run)(params, x, y, keep, key)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=x.dtype)


def gradient_penalty(
    params: Any,
    critic: Callable[[Any, Array, Array], Array],
    x: Array,
    y: Array,
    x_product: Array,
    y_product: Array,
    *,
    key: Array,
    one_sided: bool = False,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far the critic's slope is from 1 between pairs of the joint and of the product distribution.

    `mean_i (||grad f(xh_i, yh_i)|| - 1)^2` with `(xh, yh) = e (x, y) + (1 - e) (x', y')`, `e ~ U(0, 1)` for each row;
    one-sided, slopes below 1 cost nothing.

    Args:
        params: of the critic, any pytree.
        critic: `critic(params, x, y)`, a scalar for ONE pair.
        x: float [N, ...], with `y` pairs of the joint distribution.
        y: float [N, ...].
        x_product: like `x`, with `y_product` pairs of the product distribution.
        y_product: like `y`.
        key: draws e; one number for each row (of all shards).
        one_sided: whether only slopes above 1 are penalised.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `x`; 0 without any row.

    Raises:
        ValueError: shapes do not fit, inputs are not floating, or the critic's result is not a scalar.

    Example:
        >>> x = jnp.ones((2, 1))
        >>> steep = lambda w, x, y: 3 * jnp.sum(x) + 4 * jnp.sum(y)  # slope 5 everywhere
        >>> float(jax.jit(lambda x: gradient_penalty({}, steep, x, x, -x, -x, key=jax.random.key(0)))(x))
        16.0

    Source:
        Gulrajani et al., arXiv 1704.00028, eq. 3, as Ozair et al., arXiv 1903.11780, use it.
    """
    keep = _checked(params, critic, {"x": x, "y": y, "x_product": x_product, "y_product": y_product}, where)

    def run(params, key, keep, *arrays):
        rows = keep.shape[0]
        draws = jax.random.uniform(key, (axis_size(axis_name) * rows,), compute_dtype(*arrays))
        draws = draws[axis_index(axis_name) * rows + jnp.arange(rows)]
        return _penalties(params, critic, *(zero_where_false(a, keep) for a in arrays), draws, one_sided)

    terms = rows_mixed(run)(params, key, keep, x, y, x_product, y_product)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=x.dtype)


def wasserstein_dual_bound(scores: Array, *, where: Array | None = None) -> Array:
    """Returns the Kantorovich-Rubinstein bound of the Wasserstein dependency, `mean_i f_ii - mean_{i != j} f_ij`.

    A lower bound in expectation if the critic is 1-Lipschitz in the pair; the gradient penalty sees to that.

    Args:
        scores: float [N, N], critic values f(x_i, y_j).
        where: bool [N], real pairs; rows and columns of the others take no part.

    Returns:
        Scalar in the units of the data, in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(wasserstein_dual_bound(jnp.eye(4)))
        1.0

    Source:
        Ozair et al., arXiv 1903.11780.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores must be [N, N], got {scores.shape}")
    count = scores.shape[0]
    if where is not None and where.shape != (count,):
        raise ValueError(f"where has shape {where.shape}, expected ({count},)")
    keep = jnp.ones(count, bool) if where is None else where

    def run(scores, keep):
        product = keep[:, None] & keep[None, :] & ~jnp.eye(count, dtype=bool)
        gap = masked_mean(jnp.diagonal(scores), keep) - masked_mean(scores, product)
        return jnp.where(jnp.sum(keep) > 1, gap, jnp.zeros_like(gap))

    return rows_mixed(run)(scores, keep)


def wasserstein_dependency(x: Array, y: Array, *, key: Array, where: Array | None = None) -> Array:
    """Returns the exact Wasserstein distance between N pairs and as many pairs of the product distribution.

    `min over one-to-one s of mean_i ||(x_i, y_i) - (x_s(i), y_p(s(i)))||` with a random permutation p. Over draws its
    mean lies above `W1(p(x, y), p(x) p(y))`, the less so the larger N. The assignment takes O(N^3) steps; the gradient
    is that of the distances between assigned pairs.

    Args:
        x: float [N, ...].
        y: float [N, ...].
        key: draws the permutation.
        where: bool [N], real pairs.

    Returns:
        Scalar in the units of the data, in the accumulation dtype; 0 without any pair.

    Raises:
        ValueError: shapes do not fit or inputs are not floating.

    Example:
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[3.0], [3.0]])  # y is the same whatever x is
        >>> float(jax.jit(lambda x, y: wasserstein_dependency(x, y, key=jax.random.key(0)))(x, y))
        0.0

    Source:
        Ozair et al., arXiv 1903.11780: the definition; by assignment on a sample (reconstructed).
    """
    keep = _checked_rows({"x": x, "y": y}, where)

    def run(x, y, keep, key):
        rows = keep.shape[0]
        wide = compute_dtype(x, y)
        x, y = (zero_where_false(a, keep).reshape(rows, -1).astype(wide) for a in (x, y))
        masks = {} if where is None else {"where": keep, "kv_where": keep}
        # A random order of the real rows, which stand first; the k-th real row takes the k-th of it.
        order = jnp.argsort(jnp.where(keep, jax.random.uniform(key, (rows,), wide), 2.0))
        drawn = y[order[jnp.maximum(jnp.cumsum(keep) - 1, 0)]]
        joint, product = jnp.concatenate([x, y], axis=1), jnp.concatenate([x, drawn], axis=1)
        column = linear_assignment(_distances(joint, product), **masks)
        away = joint - product[jnp.maximum(column, 0)]
        return masked_mean(_norm(jnp.sum(away * away, axis=1)), keep)

    return rows_mixed(run)(x, y, keep, key)


def _checked_rows(arrays: dict[str, Array], where: Array | None) -> Array:
    rows = next(iter(arrays.values())).shape[:1]
    for name, array in arrays.items():
        if array.ndim < 1 or array.shape[:1] != rows:
            raise ValueError(f"{name} has shape {array.shape}, expected [{rows[0] if rows else 'N'}, ...]")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}, expected a floating one: its distances count")
    if where is not None and where.shape != rows:
        raise ValueError(f"where has shape {where.shape}, expected {rows}")
    return jnp.ones(rows, bool) if where is None else where


def _checked(params, critic, arrays: dict[str, Array], where: Array | None) -> Array:
    keep = _checked_rows(arrays, where)
    for name in ("x", "y"):
        other = arrays.get(f"{name}_product")
        if other is not None and other.shape != arrays[name].shape:
            raise ValueError(f"{name}_product has shape {other.shape}, expected {arrays[name].shape}, as {name}")
    one = [jax.ShapeDtypeStruct(arrays[name].shape[1:], arrays[name].dtype) for name in ("x", "y")]
    found = jax.eval_shape(lambda a, b: critic(params, a, b), *one)
    if getattr(found, "shape", None) != ():
        raise ValueError(f"critic must return a scalar for one pair, got {found}")
    return keep


def _cpc_terms(params, critic, x, ys, exist, rows):
    """Returns minus the InfoNCE bound of each row [n], over the columns that exist."""
    dtype = compute_dtype(x, ys)
    scores = jax.vmap(lambda a: jax.vmap(lambda b: critic(params, a, b))(ys))(x).astype(dtype)
    # A row's own pair always stands in the sum, so that masked rows, too, have a finite logarithm.
    own = rows[:, None] == jnp.arange(ys.shape[0])[None, :]
    count = jnp.maximum(jnp.sum(exist, dtype=dtype), 1)
    positive = jnp.sum(jnp.where(own, scores, 0.0), axis=1)
    return masked_logsumexp(scores, own | exist[None, :]) - jnp.log(count) - positive


def _penalties(params, critic, x, y, x_product, y_product, draws, one_sided):
    def mixed(a, b):
        e = draws.reshape((-1,) + (1,) * (a.ndim - 1))
        return (e * a.astype(draws.dtype) + (1 - e) * b.astype(draws.dtype)).astype(a.dtype)

    def slope(x, y):
        grads = jax.grad(lambda pair: critic(params, *pair).astype(draws.dtype))((x, y))
        return _norm(sum(jnp.sum(jnp.square(g.astype(draws.dtype))) for g in grads))

    excess = jax.vmap(slope)(mixed(x, x_product), mixed(y, y_product)) - 1
    return jnp.square(jnp.maximum(excess, 0) if one_sided else excess)


def _next_real_row(exist):
    """Returns the number of the next row that exists, cyclically; 0 where there is none."""
    number = jnp.arange(exist.shape[0])
    later = exist[None, :] & (number[None, :] > number[:, None])
    return jnp.where(jnp.any(later, axis=1), jnp.argmax(later, axis=1), jnp.argmax(exist))


def _distances(a, b):
    """Returns the distances of all pairs of rows, without gradient and without an array over pairs and features."""
    a, b = jax.lax.stop_gradient((a, b))
    centre = jnp.mean(b, axis=0, keepdims=True)  # the product cancels least about the mean
    a, b = a - centre, b - centre
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None, :] - 2 * product
    return jnp.sqrt(jnp.maximum(square, 0))


def _norm(square):
    """Returns the square root, with gradient 0 at 0."""
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
