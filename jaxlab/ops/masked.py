"""Reductions that stay finite, in value and gradient, whatever stands under the mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def compute_dtype(*arrays: Any) -> jnp.dtype:
    """Returns the dtype to accumulate in: float64 if any array has it, otherwise float32.

    Example:
        >>> import jax.numpy as jnp
        >>> compute_dtype(jnp.ones(2, jnp.bfloat16)).name
        'float32'
    """
    wide = any(getattr(a, "dtype", None) == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def zero_where_false(x: Array, where: Array | None) -> Array:
    """Returns `x` with zeros where the mask is False, so that nothing there (NaN included) reaches value or gradient.

    Args:
        x: [..., any dims], floating.
        where: bool, of the leading dims of `x`; None keeps everything.

    Example:
        >>> import jax.numpy as jnp
        >>> zero_where_false(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
        [1.0, 0.0]
    """
    if where is None:
        return x
    if x.shape[: where.ndim] != where.shape:
        raise ValueError(f"where has shape {where.shape}, expected the leading dims of x, which has shape {x.shape}")
    where = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
    return jnp.where(where, x, jnp.zeros((), x.dtype))


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Returns `numerator / denominator`, and 0 with zero gradient where the denominator is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> safe_divide(jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    empty = denominator == 0
    quotient = numerator / jnp.where(empty, jnp.ones_like(denominator), denominator)
    return jnp.where(empty, jnp.zeros_like(quotient), quotient)


def masked_sum(x: Array, where: Array | None = None, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """Returns the sum over `axis` of the entries that the mask keeps, accumulated in at least float32.

    Args:
        x: floating, any shape.
        where: bool with the shape of `x` or of its leading dims; None keeps everything.
        axis: as in `jnp.sum`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(masked_sum(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
        1.0
    """
    x = zero_where_false(x, where)
    return jnp.sum(x, axis=axis, dtype=compute_dtype(x))


def masked_mean(x: Array, where: Array | None = None, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """Returns the mean over `axis` of the entries that the mask keeps; nothing kept gives 0.

    Args:
        x: floating, any shape.
        where: bool with the shape of `x` or of its leading dims.
        axis: as in `jnp.mean`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
        2.0
    """
    if where is None:
        return jnp.mean(x, axis=axis, dtype=compute_dtype(x))
    total = masked_sum(x, where, axis=axis)
    full = jnp.broadcast_to(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x.shape)
    return safe_divide(total, jnp.sum(full, axis=axis, dtype=total.dtype))


def masked_logsumexp(x: Array, where: Array | None = None, *, axis: int = -1) -> Array:
    """Returns `log(sum(exp(x)))` over the entries kept; `-inf` with zero gradient where nothing is kept.

    Example:
        >>> import jax.numpy as jnp
        >>> float(masked_logsumexp(jnp.array([0.0, jnp.nan]), jnp.array([True, False])))
        0.0
    """
    keep = jnp.ones(x.shape, bool) if where is None else jnp.broadcast_to(where, x.shape)
    x = jnp.where(keep, x, jnp.zeros((), x.dtype)).astype(compute_dtype(x))
    top = jax.lax.stop_gradient(jnp.max(jnp.where(keep, x, -jnp.inf), axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
    total = jnp.sum(jnp.where(keep, jnp.exp(x - top), 0.0), axis=axis)
    some = total > 0
    return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + jnp.squeeze(top, axis), -jnp.inf)


def masked_softmax(x: Array, where: Array | None = None, *, axis: int = -1) -> Array:
    """Returns the softmax over the entries kept, 0 elsewhere; a row with nothing kept is all 0.

    Example:
        >>> import jax.numpy as jnp
        >>> masked_softmax(jnp.array([1.0, 1.0, jnp.nan]), jnp.array([True, True, False])).tolist()
        [0.5, 0.5, 0.0]
    """
    keep = jnp.ones(x.shape, bool) if where is None else jnp.broadcast_to(where, x.shape)
    dtype = x.dtype
    x = jnp.where(keep, x, jnp.zeros((), x.dtype)).astype(compute_dtype(x))
    top = jnp.max(jnp.where(keep, x, -jnp.inf), axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top)))
    exponential = jnp.where(keep, jnp.exp(x - top), 0.0)
    return safe_divide(exponential, jnp.sum(exponential, axis=axis, keepdims=True)).astype(dtype)


def safe_normalize(x: Array, *, axis: int | tuple[int, ...] = -1, eps: float = 1e-12) -> Array:
    """Returns `x / max(norm(x), eps)` along `axis`; the zero vector stays zero, with zero gradient.

    The vector is scaled by its largest entry first, so that neither huge nor tiny vectors overflow in the square.

    Example:
        >>> import jax.numpy as jnp
        >>> safe_normalize(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    dtype = x.dtype
    x = x.astype(compute_dtype(x))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    empty = largest <= eps
    unit = jnp.where(empty, jnp.zeros_like(x), x) / jnp.where(empty, jnp.ones_like(largest), largest)
    square = jnp.sum(unit * unit, axis=axis, keepdims=True)
    return (unit / jnp.sqrt(jnp.where(empty, jnp.ones_like(square), square))).astype(dtype)
