"""The pre-norm transformer block that the backbones share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.attention import attention
from jaxlab.ops.layers import dense
from jaxlab.types import Layer, accepted


def transformer_block(
    width: int,
    heads: int,
    *,
    feed_forward: Layer,
    norm: Layer,
    causal: bool = False,
    rotary: bool = False,
) -> Layer:
    """Returns `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        width: features per token.
        heads: attention heads; must divide `width`.
        feed_forward: over tokens `[T, width]`; one that returns `(y, RoutingPlan)` is a mixture of experts.
        norm: normalisation over the features.
        causal: whether a token sees only itself and those before it.
        rotary: whether queries and keys are rotated by their positions (Su et al., arXiv 2104.09864).

    Returns:
        A `Layer`: `init(key, width)`, `apply(params, x [B, T, width], segment_ids=None, key=None, train=False)` gives
        `(y, plan)`, with plan None unless the feed-forward layer makes one. Tokens see only those of their own segment;
        -1 is padding.

    Raises:
        ValueError: `heads` does not divide `width`, or rotary positions are asked for with heads of odd size.

    Example:
        >>> from jaxlab.ops.layers import feature_norm, mlp
        >>> block = transformer_block(8, 2, feed_forward=mlp([16, 8]), norm=feature_norm())
        >>> block.apply(block.init(jax.random.key(0), 8), jnp.ones((1, 3, 8)))[0].shape
        (1, 3, 8)
    """
    if width % heads:
        raise ValueError(f"heads={heads} must divide width={width}")
    if rotary and (width // heads) % 2:
        raise ValueError(f"heads={heads} gives heads of odd size {width // heads}: rotary positions need an even one")
    qkv, out = dense(3 * width, bias=False), dense(width, scale=0.25)

    def init(key, size):
        key_qkv, key_out, key_ff = jax.random.split(key, 3)
        return {
            "norm_attention": norm.init(key, size),
            "qkv": qkv.init(key_qkv, size),
            "out": out.init(key_out, size),
            "norm_ff": norm.init(key, size),
            "ff": feed_forward.init(key_ff, size),
        }

    def apply(params, x, *, segment_ids=None, key=None, train=False):
        n, tokens, _ = x.shape
        y = qkv.apply(params["qkv"], norm.apply(params["norm_attention"], x))
        q, k, v = jnp.moveaxis(y.reshape(n, tokens, 3, heads, width // heads), 2, 0)
        if rotary:
            q, k = _rotated(q), _rotated(k)
        y = attention(q, k, v, causal=causal, q_segment_ids=segment_ids, kv_segment_ids=segment_ids)
        x = x + out.apply(params["out"], jnp.reshape(y, (n, tokens, width)))
        flat = norm.apply(params["norm_ff"], x).reshape(n * tokens, width)
        y = feed_forward.apply(params["ff"], flat, **accepted(feed_forward.apply, key=key, train=train))
        y, plan = y if isinstance(y, tuple) else (y, None)
        return x + y.reshape(n, tokens, width), plan

    return Layer(init, apply)


def run_blocks(blocks, params, x: Array, *, penalty: Callable | None, key=None, **keywords) -> tuple[Array, dict]:
    """Runs blocks one after the other; also returns what their routing plans say, as entries of the output."""
    plans = []
    for i, block in enumerate(blocks):
        block_key = None if key is None else jax.random.fold_in(key, i)
        x, plan = block.apply(params[f"block_{i}"], x, key=block_key, **keywords)
        plans += [] if plan is None else [plan]
    if not plans:
        return x, {}
    extra = {"expert_counts": jnp.stack([plan.counts for plan in plans])}
    if penalty is not None:
        extra["penalty"] = jnp.mean(jnp.stack([penalty(plan) for plan in plans]))
    return x, extra


def _rotated(x: Array, base: float = 10_000.0) -> Array:
    """Returns [B, T, N, H] with the pair (x_i, x_{i + H/2}) of token t turned by the angle `t base^(-2 i / H)`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * base ** (-jnp.arange(half) / half)[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
