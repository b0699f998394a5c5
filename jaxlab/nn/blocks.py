"""The pre-norm transformer block that the backbones share, in Flax NNX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxlab.kernels.attention import attention
from jaxlab.nn.bridges import from_nnx, to_nnx
from jaxlab.types import Layer, StatefulLayer


def transformer_block(
    width: int,
    heads: int,
    *,
    feed_forward: Layer,
    norm: Layer,
    causal: bool = False,
    rotary: bool = False,
) -> StatefulLayer:
    """Returns `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        width: features per token.
        heads: attention heads; must divide `width`.
        feed_forward: over tokens `[T, width]`; one that returns `(y, RoutingPlan)` is a mixture of experts.
        norm: normalisation over the features.
        causal: whether a token sees only itself and those before it.
        rotary: whether queries and keys are rotated by their positions (Su et al., arXiv 2104.09864).

    Returns:
        A `StatefulLayer` (its state is empty): `init(key, *dims)` (the dims are not needed), `apply(params, state,
        x [B, T, width], segment_ids=None, key=None, train=False)` gives `(y, plan)`, with plan None unless the
        feed-forward layer makes one. Tokens see only those of their own segment; -1 is padding.

    Raises:
        ValueError: `heads` does not divide `width`, or rotary positions are asked for with heads of odd size.

    Example:
        >>> from jaxlab.ops.layers import feature_norm, mlp
        >>> block = transformer_block(8, 2, feed_forward=mlp([16, 8]), norm=feature_norm())
        >>> params, state = block.init(jax.random.key(0))
        >>> (y, plan), state = block.apply(params, state, jnp.ones((1, 3, 8)))
        >>> y.shape, plan
        ((1, 3, 8), None)
    """
    check_options(width, heads, rotary)
    return from_nnx(lambda rngs: Block(width, heads, feed_forward, norm, causal, rotary, rngs))


class Block(nnx.Module):
    """The block as a module, for backbones to compose."""

    def __init__(self, width: int, heads: int, feed_forward: Layer, norm: Layer, causal, rotary, rngs: nnx.Rngs):
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.norm_attention, self.norm_ff = to_nnx(norm, width, rngs=rngs), to_nnx(norm, width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, kernel_init=normal(1.0), rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=normal(0.25), rngs=rngs)
        self.ff = to_nnx(feed_forward, width, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, key=None, train=False):
        """Returns `(y, plan)` of x [B, T, width]."""
        n, tokens, width = x.shape
        y = self.qkv(self.norm_attention(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = jnp.moveaxis(y, 2, 0)
        if self.rotary:
            q, k = _rotated(q), _rotated(k)
        y = attention(q, k, v, causal=self.causal, q_segment_ids=segment_ids, kv_segment_ids=segment_ids)
        x = x + self.out(jnp.reshape(y, (n, tokens, width)))
        y = self.ff(self.norm_ff(x).reshape(n * tokens, width), key=key, train=train)
        y, plan = y if isinstance(y, tuple) else (y, None)
        return x + y.reshape(n, tokens, width), plan


# What the backward pass keeps of a block, besides its input.
REMAT = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_blocks(blocks, x: Array, *, penalty: Callable | None, remat: str, key=None, **keywords) -> tuple[Array, dict]:
    """Runs blocks one after the other; also returns what their routing plans say, as entries of the output."""
    plans = []
    for i, block in enumerate(blocks):
        block_key = None if key is None else jax.random.fold_in(key, i)

        def run(x, block=block, block_key=block_key):
            return block(x, key=block_key, **keywords)

        x, plan = (run if remat == "none" else jax.checkpoint(run, policy=REMAT[remat]))(x)
        plans += [] if plan is None else [plan]
    if not plans:
        return x, {}
    extra = {"expert_counts": jnp.stack([plan.counts for plan in plans])}
    if penalty is not None:
        extra["penalty"] = jnp.mean(jnp.stack([penalty(plan) for plan in plans]))
    return x, extra


def check_options(width: int, heads: int, rotary: bool, remat: str = "none") -> None:
    """Raises a ValueError for heads that do not fit the width, or an unknown way to save memory."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} must be one of {', '.join(REMAT)}")
    if width % heads:
        raise ValueError(f"heads={heads} must divide width={width}")
    if rotary and (width // heads) % 2:
        raise ValueError(f"heads={heads} gives heads of odd size {width // heads}: rotary positions need an even one")


def normal(scale: float) -> nnx.Initializer:
    """Returns the initialiser `N(0, scale / inputs)`."""
    return nnx.initializers.variance_scaling(scale, "fan_in", "normal")


def _rotated(x: Array, base: float = 10_000.0) -> Array:
    """Returns [B, T, N, H] with the pair (x_i, x_{i + H/2}) of token t turned by the angle `t base^(-2 i / H)`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * base ** (-jnp.arange(half) / half)[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
