"""A causal transformer over token ids in Flax NNX, whose feed-forward layers can be sparse mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlab.nn.blocks import Block, check_options, normal, run_blocks
from jaxlab.nn.bridges import from_nnx, to_nnx
from jaxlab.ops.layers import feature_norm, mlp
from jaxlab.types import Layer, RoutingPlan, StatefulLayer


def causal_transformer(
    vocabulary: int,
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    feed_forward: Callable[[], Layer] | None = None,
    penalty: Callable[[RoutingPlan], jax.Array] | None = None,
    remat: str = "none",
) -> StatefulLayer:
    """Returns a pre-norm causal transformer with rotary positions, which predicts the next token.

    Args:
        vocabulary: V, number of token ids.
        width: features per token.
        depth: number of blocks.
        heads: attention heads; must divide `width` into an even size.
        feed_forward: makes the feed-forward `Layer` of one block, over tokens `[T, width]`; one that returns
            `(y, RoutingPlan)` is a mixture of experts. Default: an MLP of hidden width `4 * width`.
        penalty: scalar of a plan that is averaged over the blocks into the output's `penalty`.
        remat: what the backward pass computes again to save memory: "none", "block" (everything inside a block) or
            "dots" (all but the matrix products).

    Returns:
        A `StatefulLayer` (its state is empty): `init(key, *dims)` (the dims are not needed), `apply(params, state,
        tokens int [B, T], segment_ids=None, key=None, train=False)` gives a dict: `logits [B, T, V]`, of the token
        after each, and with a mixture of experts `penalty []` and `expert_counts [depth, E]`. `segment_ids` int32
        [B, T] keep documents apart; -1 is padding, which nothing sees.

    Raises:
        ValueError: `heads` does not divide `width` into an even size, or `tokens` are not integers [B, T].

    Example:
        >>> net = causal_transformer(11, width=8, depth=1, heads=2)
        >>> params, state = net.init(jax.random.key(0))
        >>> net.apply(params, state, jnp.arange(6).reshape(2, 3))[0]["logits"].shape
        (2, 3, 11)
    """
    check_options(width, heads, True, remat)
    feed_forward = (lambda: mlp([4 * width, width], activation=jax.nn.gelu)) if feed_forward is None else feed_forward

    def make(rngs):
        blocks = [Block(width, heads, feed_forward(), feature_norm(), True, True, rngs) for _ in range(depth)]
        return _CausalTransformer(vocabulary, width, blocks, penalty, remat, rngs)

    net = from_nnx(make)

    def apply(params, state, tokens, **keywords):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tokens.shape}")
        return net.apply(params, state, tokens, **keywords)

    return StatefulLayer(net.init, apply)


class _CausalTransformer(nnx.Module):
    def __init__(self, vocabulary, width, blocks, penalty, remat, rngs):
        self.penalty, self.remat = penalty, remat
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocabulary, width)))
        self.blocks = nnx.List(blocks)
        self.norm = to_nnx(feature_norm(), width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, kernel_init=normal(1.0), rngs=rngs)

    def __call__(self, tokens, *, segment_ids=None, key=None, train=False):
        x, extra = run_blocks(
            self.blocks,
            self.embed[...][tokens],
            penalty=self.penalty,
            remat=self.remat,
            segment_ids=segment_ids,
            key=key,
            train=train,
        )
        return {"logits": self.head(self.norm(x)), **extra}
