"""Softmax attention with grouped-query heads, masks, and memory linear in the length."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels._select import choose
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.sharding import rows_mixed

_BLOCK = 512  # sequences up to one block go through the dense form, longer ones through blocks of this length


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | None = None,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Returns `softmax(cap(scale q k^T) + bias) v` over the keys that the masks allow.

    `cap(s) = soft_cap tanh(s / soft_cap)`. A query with nothing to attend to gives exactly 0 in value and gradient,
    whatever stands in padded queries, keys and values. Products accumulate in float32.

    Args:
        q: [B, T, N, H] queries.
        k: [B, S, K, H] keys; K divides N, and head n reads `k[:, :, n // (N // K)]`.
        v: [B, S, K, H] values.
        causal: query t sees key s only if `s <= t + S - T`, so that the ends of both sequences align.
        window: with `causal`, number of keys that a query sees, its own included: `s > t + S - T - window`.
        q_segment_ids: int32 [B, T]; a query sees only keys of its own segment; -1 = padding. Comes with the next.
        kv_segment_ids: int32 [B, S], -1 = padding.
        bias: [B or 1, N or 1, T or 1, S or 1], added to the scores; `-inf` masks. With a bias, memory is T x S.
        scale: float, default `H ** -0.5`.
        soft_cap: float > 0, bound on the scaled scores.
        return_lse: also return the log of the softmax's denominator.
        implementation: "auto", "reference" or "xla".

    Returns:
        [B, T, N, H] in the dtype of `q`; with `return_lse` also `lse`, float32 [B, T, N], `-inf` where a query has
        nothing to attend to. Both carry gradient.

    Raises:
        ValueError: shapes do not fit, only one of the segment ids is given, or an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> v = jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> attention(jnp.zeros((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1)), v, causal=True).ravel().tolist()
        [0.0, 0.5, 1.0]
    """
    chosen = choose("attention", implementation, ("reference", "xla"))
    _check(q, k, v, causal, window, q_segment_ids, kv_segment_ids, bias, soft_cap)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    soft_cap = None if soft_cap is None else float(soft_cap)
    q, k, v, q_ids, kv_ids, bias = match_varying(q, k, v, q_segment_ids, kv_segment_ids, bias)
    if q_ids is not None:
        q = zero_where_false(q, q_ids >= 0)
        k, v = (zero_where_false(x, kv_ids >= 0) for x in (k, v))
    options = {"causal": causal, "window": window, "scale": scale, "soft_cap": soft_cap}
    if chosen == "reference" or bias is not None or max(q.shape[1], k.shape[1]) <= _BLOCK or 0 in q.shape + k.shape:
        out, lse = _dense(q, k, v, q_ids, kv_ids, bias, **options)
    else:
        out, lse = rows_mixed(functools.partial(_blocks, block=_BLOCK, **options))(q, k, v, q_ids, kv_ids)
    empty = jax.lax.stop_gradient(lse) == -jnp.inf
    out = jnp.where(empty[..., None], jnp.zeros((), out.dtype), out)
    return (out, jnp.where(empty, -jnp.inf, lse)) if return_lse else out


def _check(q, k, v, causal, window, q_ids, kv_ids, bias, soft_cap) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q must be [B, T, N, H] and k, v [B, S, K, H], got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in their first and last dimension")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the {k.shape[2]} key heads must divide the {q.shape[2]} query heads")
    if (q_ids is None) != (kv_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    if q_ids is not None and (q_ids.shape != q.shape[:2] or kv_ids.shape != k.shape[:2]):
        raise ValueError(
            f"segment ids have shapes {q_ids.shape} and {kv_ids.shape}, expected {q.shape[:2]} and {k.shape[:2]}"
        )
    if window is not None and not causal:
        raise ValueError("window needs causal=True")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive")
    if bias is not None:
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, full, strict=True)):
            raise ValueError(f"bias has shape {bias.shape}, expected {full} or 1 in place of any dimension")


def _visible(t: Array, s: Array, causal: bool, window: int | None, offset: int, keys: int) -> Array:
    """Returns bool [T, S]: which key positions s exist and lie within reach of the query positions t."""
    t, s = t[:, None] + offset, s[None, :]
    keep = jnp.broadcast_to(s < keys, (t.shape[0], s.shape[1]))
    if causal:
        keep = keep & (s <= t)
    if window is not None:
        keep = keep & (s > t - window)
    return keep


@functools.partial(jax.jit, static_argnames=("causal", "window", "scale", "soft_cap"))
def _dense(q, k, v, q_ids, kv_ids, bias, *, causal, window, scale, soft_cap) -> tuple[Array, Array]:
    """Attention as it is defined: all scores at once."""
    dtype = compute_dtype(q, k, v)
    batch, queries, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, size)
    score = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=dtype) * scale
    score = score.reshape(batch, heads, queries, keys)
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    keep = _visible(jnp.arange(queries), jnp.arange(keys), causal, window, keys - queries, keys)[None, None]
    if q_ids is not None:
        same = (q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids >= 0)[:, :, None]
        keep = keep & same[:, None]
    if bias is not None:
        finite = bias != -jnp.inf
        score = score + jnp.where(finite, bias, 0.0).astype(dtype)
        keep = keep & finite
    keep = jnp.broadcast_to(keep, score.shape)
    top = jnp.max(jnp.where(keep, score, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weight = jnp.where(keep, jnp.exp(jnp.where(keep, score - top, 0.0)), 0.0)
    total = weight.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    grouped = (weight / total).reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    out = jnp.einsum("bkgts,bskh->btkgh", grouped, v.astype(dtype), preferred_element_type=dtype)
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)[..., 0].transpose(0, 2, 1)
    return out.reshape(q.shape).astype(q.dtype), lse


class _Static(NamedTuple):
    """What the block form knows at trace time; `queries` and `keys` count real positions, without padding."""

    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None
    queries: int
    keys: int
    block_q: int
    block_k: int

    def key_blocks(self, i, blocks):
        """Range of key blocks that query block i reaches."""
        first = i * self.block_q + self.keys - self.queries
        low = 0 if self.window is None else jnp.maximum(first - self.window + 1, 0) // self.block_k
        high = jnp.clip((first + self.block_q - 1) // self.block_k + 1, 0, blocks) if self.causal else blocks
        return low, high

    def query_blocks(self, j, blocks):
        """Range of query blocks that reach key block j."""
        first = j * self.block_k - (self.keys - self.queries)
        low = jnp.maximum(first, 0) // self.block_q if self.causal else 0
        if self.window is None:
            return low, blocks
        return low, jnp.clip((first + self.block_k + self.window - 2) // self.block_q + 1, 0, blocks)


@functools.partial(jax.jit, static_argnames=("causal", "window", "scale", "soft_cap", "block"))
def _blocks(q, k, v, q_ids, kv_ids, *, causal, window, scale, soft_cap, block) -> tuple[Array, Array]:
    """The block form: pads to whole blocks, one row of work per batch entry and key head, and back."""
    batch, queries, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    static = _Static(causal, window, scale, soft_cap, queries, keys, min(block, queries), min(block, keys))
    pad_q, pad_k = -queries % static.block_q, -keys % static.block_k
    q = jnp.pad(q, ((0, 0), (0, pad_q), (0, 0), (0, 0)))
    q = q.reshape(batch, queries + pad_q, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, heads // kv_heads, queries + pad_q, size)
    k, v = (
        jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))).transpose(0, 2, 1, 3).reshape(batch * kv_heads, -1, size)
        for x in (k, v)
    )
    if q_ids is not None:
        q_ids, kv_ids = (
            jnp.repeat(jnp.pad(ids, ((0, 0), (0, pad)), constant_values=-1), kv_heads, axis=0)
            for ids, pad in ((q_ids, pad_q), (kv_ids, pad_k))
        )
    out, lse = _flash(static, q, k, v, q_ids, kv_ids)
    out = out.reshape(batch, heads, queries + pad_q, size)[:, :, :queries].transpose(0, 2, 1, 3)
    return out, lse.reshape(batch, heads, queries + pad_q)[:, :, :queries].transpose(0, 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static, q, k, v, q_ids, kv_ids):
    """Online softmax: q [R, G, T, H], k and v [R, S, H], ids [R, T] and [R, S] give [R, G, T, H] and [R, G, T]."""
    return jax.lax.map(lambda row: _row_forward(static, *row), (q, k, v, q_ids, kv_ids))


def _flash_forward(static, q, k, v, q_ids, kv_ids):
    out, lse = _flash(static, q, k, v, q_ids, kv_ids)
    return (out, lse), (q, k, v, q_ids, kv_ids, out, lse)


def _flash_backward(static, saved, cotangents):
    dq, dk, dv = jax.lax.map(lambda row: _row_backward(static, *row), (*saved, *cotangents))
    return dq, dk, dv, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _slice(x, i, size, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _scores(static, q, k, q_ids, kv_ids, i, j, dtype) -> tuple[Array, Array]:
    """Returns scores [G, block_q, block_k] of query block i with key block j, and the mask [1, block_q, block_k]."""
    score = jnp.einsum("gth,sh->gts", q, k, preferred_element_type=dtype) * static.scale
    if static.soft_cap is not None:
        score = static.soft_cap * jnp.tanh(score / static.soft_cap)
    t = i * static.block_q + jnp.arange(static.block_q)
    s = j * static.block_k + jnp.arange(static.block_k)
    keep = _visible(t, s, static.causal, static.window, static.keys - static.queries, static.keys)
    if q_ids is not None:
        rows = _slice(q_ids, i, static.block_q, 0)[:, None]
        keep = keep & (rows == _slice(kv_ids, j, static.block_k, 0)[None, :]) & (rows >= 0)
    return score, keep[None]


def _row_forward(static, q, k, v, q_ids, kv_ids):
    dtype = compute_dtype(q, k, v)
    groups, queries, size = q.shape
    blocks_k = k.shape[0] // static.block_k

    def query_block(i):
        q_block = _slice(q, i, static.block_q, 1)

        def key_block(j, carry):
            top, total, acc = carry
            k_block, v_block = (_slice(x, j, static.block_k, 0) for x in (k, v))
            score, keep = _scores(static, q_block, k_block, q_ids, kv_ids, i, j, dtype)
            new = jnp.maximum(top, jnp.max(jnp.where(keep, score, -jnp.inf), axis=-1))
            base = jnp.where(new == -jnp.inf, 0.0, new)
            weight = jnp.exp(jnp.where(keep, score - base[..., None], -jnp.inf))
            shrink = jnp.exp(top - base)
            added = jnp.einsum("gts,sh->gth", weight.astype(v.dtype), v_block, preferred_element_type=dtype)
            return new, total * shrink + weight.sum(-1), acc * shrink[..., None] + added

        start = (
            jnp.full((groups, static.block_q), -jnp.inf, dtype),
            jnp.zeros((groups, static.block_q), dtype),
            jnp.zeros((groups, static.block_q, size), dtype),
        )
        low, high = static.key_blocks(i, blocks_k)
        top, total, acc = jax.lax.fori_loop(low, high, key_block, match_varying(start, q)[0])
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        return (acc / total[..., None]).astype(q.dtype), jnp.where(empty, -jnp.inf, jnp.log(total) + top)

    out, lse = jax.lax.map(query_block, jnp.arange(queries // static.block_q))
    return out.transpose(1, 0, 2, 3).reshape(q.shape), lse.transpose(1, 0, 2).reshape(groups, queries)


def _row_backward(static, q, k, v, q_ids, kv_ids, out, lse, d_out, d_lse):
    dtype = compute_dtype(q, k, v)
    queries = q.shape[1]
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse
    base = jnp.where(lse == -jnp.inf, 0.0, lse)

    def key_block(dq, j):
        k_block, v_block = (_slice(x, j, static.block_k, 0) for x in (k, v))

        def query_block(i, carry):
            dq, dk, dv = carry
            q_block, do_block, base_block, delta_block = (
                _slice(x, i, static.block_q, 1) for x in (q, d_out, base, delta)
            )
            score, keep = _scores(static, q_block, k_block, q_ids, kv_ids, i, j, dtype)
            weight = jnp.exp(jnp.where(keep, score - base_block[..., None], -jnp.inf))
            dv = dv + jnp.einsum("gts,gth->sh", weight.astype(q.dtype), do_block, preferred_element_type=dtype)
            d_weight = jnp.einsum("gth,sh->gts", do_block, v_block, preferred_element_type=dtype)
            d_score = jnp.where(keep, weight * (d_weight - delta_block[..., None]), 0.0) * static.scale
            if static.soft_cap is not None:
                d_score = d_score * (1.0 - jnp.square(score / static.soft_cap))
            d_score = d_score.astype(q.dtype)
            dk = dk + jnp.einsum("gts,gth->sh", d_score, q_block, preferred_element_type=dtype)
            added = jnp.einsum("gts,sh->gth", d_score, k_block, preferred_element_type=dtype)
            here = _slice(dq, i, static.block_q, 1) + added
            return jax.lax.dynamic_update_slice_in_dim(dq, here, i * static.block_q, axis=1), dk, dv

        low, high = static.query_blocks(j, queries // static.block_q)
        zero = match_varying(jnp.zeros(k_block.shape, dtype), k)[0]
        dq, dk, dv = jax.lax.fori_loop(low, high, query_block, (dq, zero, zero))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    start = match_varying(jnp.zeros(q.shape, dtype), q)[0]
    dq, (dk, dv) = jax.lax.scan(key_block, start, jnp.arange(k.shape[0] // static.block_k))
    return dq.astype(q.dtype), dk.reshape(k.shape), dv.reshape(v.shape)
