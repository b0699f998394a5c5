"""A causal transformer over token ids whose feed-forward layers can be sparse mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlab.nn.blocks import run_blocks, transformer_block
from jaxlab.ops.layers import dense, feature_norm, mlp
from jaxlab.types import Layer, RoutingPlan


def causal_transformer(
    vocabulary: int,
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    feed_forward: Callable[[], Layer] | None = None,
    penalty: Callable[[RoutingPlan], jax.Array] | None = None,
) -> Layer:
    """Returns a pre-norm causal transformer with rotary positions, which predicts the next token.

    Args:
        vocabulary: V, number of token ids.
        width: features per token.
        depth: number of blocks.
        heads: attention heads; must divide `width` into an even size.
        feed_forward: makes the feed-forward `Layer` of one block, over tokens `[T, width]`; one that returns
            `(y, RoutingPlan)` is a mixture of experts. Default: an MLP of hidden width `4 * width`.
        penalty: scalar of a plan that is averaged over the blocks into the output's `penalty`.

    Returns:
        A `Layer`: `init(key, *dims)` (the dims are not needed), `apply(params, tokens int [B, T], segment_ids=None,
        key=None, train=False)` gives a dict: `logits [B, T, V]`, of the token after each, and with a mixture of
        experts `penalty []` and `expert_counts [depth, E]`. `segment_ids` int32 [B, T] keep documents apart; -1 is
        padding, which nothing sees.

    Raises:
        ValueError: `heads` does not divide `width` into an even size, or `tokens` are not integers [B, T].

    Example:
        >>> net = causal_transformer(11, width=8, depth=1, heads=2)
        >>> net.apply(net.init(jax.random.key(0)), jnp.arange(6).reshape(2, 3))["logits"].shape
        (2, 3, 11)
    """
    feed_forward = (lambda: mlp([4 * width, width], activation=jax.nn.gelu)) if feed_forward is None else feed_forward
    norm, head = feature_norm(), dense(vocabulary, bias=False)
    blocks = [
        transformer_block(width, heads, feed_forward=feed_forward(), norm=norm, causal=True, rotary=True)
        for _ in range(depth)
    ]

    def init(key, *dims):
        del dims
        key_embed, key_head, *keys = jax.random.split(key, depth + 2)
        return {
            "embed": 0.02 * jax.random.normal(key_embed, (vocabulary, width)),
            "norm": norm.init(key_head, width),
            "head": head.init(key_head, width),
            **{f"block_{i}": block.init(keys[i], width) for i, block in enumerate(blocks)},
        }

    def apply(params, tokens, *, segment_ids=None, key=None, train=False):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tokens.shape}")
        x = params["embed"][tokens]
        x, extra = run_blocks(blocks, params, x, penalty=penalty, segment_ids=segment_ids, key=key, train=train)
        return {"logits": head.apply(params["head"], norm.apply(params["norm"], x)), **extra}

    return Layer(init, apply)
