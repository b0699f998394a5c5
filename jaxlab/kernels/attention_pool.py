"""Softmax pooling of ragged bags: one vector for each of many bags of any size, in memory that their values set."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels._select import choose
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed

_CHUNK = 2048  # instances of one product
_MEMBERS = 512  # up to so many bags and heads the sum over a bag is a product with the matrix of who is in which


def attention_pool(
    values: Array,
    scores: Array,
    segment_ids: Array,
    num_segments: int,
    *,
    return_weights: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Returns `z_b = sum_i a_i values_i` with `a` the softmax of the scores over the instances of bag b.

    Sums are float32. Values are read once in the forward and once in the backward; no weighted copy of them is made.

    Args:
        values: [T, D] instances of all bags, in any order.
        scores: [T], or [T, K] for K heads.
        segment_ids: int [T], bag of each instance; anything outside 0..B-1, such as -1, is padding.
        num_segments: B.
        return_weights: also return a.
        implementation: "auto", "reference" (segment sums of weighted values) or "xla".

    Returns:
        [B, D], or [B, K, D] with heads, in the dtype of `values`; an empty bag gives 0. With `return_weights` also a,
        shaped like `scores`, in the dtype of accumulation: 0 on padding, and it carries gradient.

    Raises:
        ValueError: shapes do not fit, or `num_segments` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> values, ids = jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 2])
        >>> attention_pool(values, jnp.zeros(3), ids, 3).tolist()
        [[2.0], [0.0], [5.0]]

    Source:
        Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, eq. 7.
    """
    chosen = choose("attention_pool", implementation, ("reference", "xla"))
    if values.ndim != 2 or segment_ids.shape != values.shape[:1]:
        raise ValueError(f"values and segment_ids must be [T, D] and [T], got {values.shape} and {segment_ids.shape}")
    if scores.ndim not in (1, 2) or scores.shape[0] != values.shape[0]:
        raise ValueError(f"scores has shape {scores.shape}, expected ({values.shape[0]},) or ({values.shape[0]}, K)")
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments} must be at least 1")
    dtype = compute_dtype(values, scores)
    ids = jnp.asarray(segment_ids, jnp.int32)
    keep = (ids >= 0) & (ids < num_segments)
    ids = jnp.where(keep, ids, num_segments)
    heads = scores if scores.ndim == 2 else scores[:, None]
    heads = zero_where_false(heads.astype(dtype), keep)
    form = _reference if chosen == "reference" else functools.partial(_xla, chunk=_CHUNK)
    run = rows_mixed(functools.partial(form, bags=num_segments))
    pooled, weights = run(*match_varying(values, heads, ids))
    pooled = pooled.astype(values.dtype)
    if scores.ndim == 1:
        pooled, weights = pooled[:, 0], weights[:, 0]
    return (pooled, weights) if return_weights else pooled


def _softmax(scores: Array, ids: Array, bags: int) -> Array:
    """Returns the softmax over each bag [T, K]; ids equal to `bags` are padding."""
    keep = (ids < bags)[:, None]
    low = jnp.where(keep, scores, -jnp.inf)
    top = jax.ops.segment_max(jax.lax.stop_gradient(low), ids, bags + 1)
    top = jnp.where(jnp.isfinite(top), top, 0.0)[ids]
    weight = jnp.where(keep, jnp.exp(jnp.where(keep, scores - top, 0.0)), 0.0)
    return safe_divide(weight, jax.ops.segment_sum(weight, ids, bags + 1)[ids])


@functools.partial(jax.jit, static_argnames=("bags",))
def _reference(values, scores, ids, *, bags):
    weights = _softmax(scores, ids, bags)
    values = zero_where_false(values, ids < bags).astype(weights.dtype)
    return jax.ops.segment_sum(weights[:, :, None] * values[:, None, :], ids, bags + 1)[:-1], weights


@functools.partial(jax.jit, static_argnames=("bags", "chunk"))
def _xla(values, scores, ids, *, bags, chunk):
    weights = _softmax(scores, ids, bags)
    return _weighted_sums((bags, chunk), values, weights, ids), weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sums(static, values, weights, ids):
    """Returns [B, K, D]: over the instances of each bag, the sum of weight times value."""
    bags, chunk = static
    heads, size = weights.shape[1], values.shape[1]

    def add(total, start, rows):
        v, w, i = _slices(start, rows, values, weights, ids)
        v = jnp.where((i < bags)[:, None], v, jnp.zeros((), v.dtype))
        if bags * heads > _MEMBERS:
            return total + jax.ops.segment_sum(w[:, :, None] * v[:, None, :].astype(w.dtype), i, bags + 1)[:-1]
        member = (i[:, None] == jnp.arange(bags)[None, :]).astype(w.dtype)
        member = (member[:, :, None] * w[:, None, :]).reshape(rows, bags * heads)
        product = jax.lax.dot_general(member.T, v, (((1,), (0,)), ((), ())), preferred_element_type=w.dtype)
        return total + product.reshape(total.shape)

    return _over_chunks(chunk, add, match_varying(jnp.zeros((bags, heads, size), weights.dtype), values)[0], ids)


def _weighted_sums_forward(static, *args):
    return _weighted_sums(static, *args), args


def _weighted_sums_backward(static, saved, g):
    """dv_i = sum_k w_ik g[bag, k] and dw_ik = v_i . g[bag, k]."""
    bags, chunk = static
    values, weights, ids = saved

    def add(grads, start, rows):
        d_values, d_weights = grads
        v, w, i = _slices(start, rows, values, weights, ids)
        keep = (i < bags)[:, None]
        own = g[jnp.minimum(i, bags - 1)]
        dv = jnp.where(keep, jnp.einsum("tk,tkd->td", w, own), 0.0).astype(v.dtype)
        dw = jnp.einsum("td,tkd->tk", jnp.where(keep, v, jnp.zeros((), v.dtype)).astype(w.dtype), own)
        d_values = jax.lax.dynamic_update_slice_in_dim(d_values, dv, start, 0)
        return d_values, jax.lax.dynamic_update_slice_in_dim(d_weights, jnp.where(keep, dw, 0.0), start, 0)

    start = match_varying((jnp.zeros_like(values), jnp.zeros_like(weights)), g)[0]
    d_values, d_weights = _over_chunks(chunk, add, start, ids)
    return d_values, d_weights, None


_weighted_sums.defvjp(_weighted_sums_forward, _weighted_sums_backward)


def _slices(start, rows, *arrays):
    return tuple(jax.lax.dynamic_slice_in_dim(a, start, rows) for a in arrays)


def _over_chunks(chunk, add, carry, ids):
    """Runs `carry = add(carry, start, rows)` over whole chunks, then over the rest: padding would copy the values."""
    count = ids.shape[0]
    whole = count // chunk
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: add(carry, i * chunk, chunk), carry)
    return add(carry, whole * chunk, count - whole * chunk) if count % chunk else carry
