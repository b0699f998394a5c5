"""A vision transformer whose feed-forward layers can be sparse mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlab.nn.blocks import run_blocks, transformer_block
from jaxlab.ops.layers import dense, feature_norm, mlp
from jaxlab.types import Layer, RoutingPlan


def vit(
    num_classes: int,
    *,
    patch: int = 2,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    feed_forward: Callable[[], Layer] | None = None,
    penalty: Callable[[RoutingPlan], jax.Array] | None = None,
) -> Layer:
    """Returns a pre-norm vision transformer: patches, `depth` blocks, mean over tokens, linear head.

    Args:
        num_classes: C.
        patch: side of a square patch; must divide height and width.
        width: features per token.
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        feed_forward: makes the feed-forward `Layer` of one block, over tokens `[T, width]`; one that returns
            `(y, RoutingPlan)` is a mixture of experts. Default: an MLP of hidden width `4 * width`.
        penalty: scalar of a plan that is averaged over the blocks into the output's `penalty`.

    Returns:
        A `Layer`: `init(key, image)` with `image` a `jax.ShapeDtypeStruct` or shape `[..., H, W, channels]`,
        `apply(params, x [N, H, W, channels], key=None, train=False)` gives a dict: `logits [N, C]` and, with a
        mixture of experts, `penalty []` and `expert_counts [depth, E]`.

    Raises:
        ValueError: `patch` does not divide the image or `heads` does not divide `width`.
    """
    feed_forward = (lambda: mlp([4 * width, width], activation=jax.nn.gelu)) if feed_forward is None else feed_forward
    embed, head, norm = dense(width), dense(num_classes), feature_norm()
    blocks = [transformer_block(width, heads, feed_forward=feed_forward(), norm=norm) for _ in range(depth)]

    def grid(shape):
        h, w = shape[-3], shape[-2]
        if h % patch or w % patch:
            raise ValueError(f"patch={patch} must divide the image, which is {h} x {w}")
        return h // patch, w // patch

    def init(key, image):
        shape = getattr(image, "shape", image)
        rows, cols = grid(shape)
        keys = jax.random.split(key, depth + 3)
        return {
            "embed": embed.init(keys[0], patch * patch * shape[-1]),
            "position": 0.02 * jax.random.normal(keys[1], (rows * cols, width)),
            "norm": norm.init(keys[2], width),
            "head": head.init(keys[2], width),
            **{f"block_{i}": block.init(keys[3 + i], width) for i, block in enumerate(blocks)},
        }

    def apply(params, x, *, key=None, train=False):
        n, c = x.shape[0], x.shape[3]
        rows, cols = grid(x.shape)
        x = x.reshape(n, rows, patch, cols, patch, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * cols, -1)
        x = embed.apply(params["embed"], x) + params["position"][None]
        x, extra = run_blocks(blocks, params, x, penalty=penalty, key=key, train=train)
        pooled = jnp.mean(norm.apply(params["norm"], x), axis=1)
        return {"logits": head.apply(params["head"], pooled), **extra}

    return Layer(init, apply)
