"""A vision transformer in Flax NNX, whose feed-forward layers can be sparse mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlab.nn.blocks import Block, check_options, normal, run_blocks
from jaxlab.nn.bridges import from_nnx, to_nnx
from jaxlab.ops.layers import feature_norm, mlp
from jaxlab.types import Layer, RoutingPlan, StatefulLayer


def vit(
    num_classes: int,
    *,
    patch: int = 2,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    feed_forward: Callable[[], Layer] | None = None,
    penalty: Callable[[RoutingPlan], jax.Array] | None = None,
    remat: str = "none",
) -> StatefulLayer:
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
        remat: what the backward pass computes again to save memory: "none", "block" (everything inside a block) or
            "dots" (all but the matrix products).

    Returns:
        A `StatefulLayer` (its state is empty): `init(key, image)` with `image` a `jax.ShapeDtypeStruct` or shape
        `[..., H, W, channels]`, `apply(params, state, x [N, H, W, channels], key=None, train=False)` gives a dict:
        `logits [N, C]` and, with a mixture of experts, `penalty []` and `expert_counts [depth, E]`.

    Raises:
        ValueError: `patch` does not divide the image or `heads` does not divide `width`.

    Example:
        >>> net = vit(3, patch=2, width=8, depth=1, heads=2)
        >>> params, state = net.init(jax.random.key(0), (4, 4, 1))
        >>> net.apply(params, state, jnp.ones((2, 4, 4, 1)))[0]["logits"].shape
        (2, 3)
    """
    check_options(width, heads, False, remat)
    feed_forward = (lambda: mlp([4 * width, width], activation=jax.nn.gelu)) if feed_forward is None else feed_forward

    def make(rngs, *image):
        blocks = [Block(width, heads, feed_forward(), feature_norm(), False, False, rngs) for _ in range(depth)]
        return _ViT(image, num_classes, patch, width, blocks, penalty, remat, rngs)

    net = from_nnx(make, dims_of=lambda x: x.shape[1:])
    return StatefulLayer(lambda key, image: net.init(key, *getattr(image, "shape", image)[-3:]), net.apply)


class _ViT(nnx.Module):
    def __init__(self, image, num_classes, patch, width, blocks, penalty, remat, rngs):
        h, w, channels = image
        if h % patch or w % patch:
            raise ValueError(f"patch={patch} must divide the image, which is {h} x {w}")
        self.grid, self.patch, self.penalty = (h // patch, w // patch), patch, penalty
        self.remat = remat
        self.embed = nnx.Linear(patch * patch * channels, width, kernel_init=normal(1.0), rngs=rngs)
        tokens = self.grid[0] * self.grid[1]
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
        self.blocks = nnx.List(blocks)
        self.norm = to_nnx(feature_norm(), width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, kernel_init=normal(1.0), rngs=rngs)

    def __call__(self, x, *, key=None, train=False):
        n, (rows, cols), size = x.shape[0], self.grid, self.patch
        x = x.reshape(n, rows, size, cols, size, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * cols, -1)
        x = self.embed(x) + self.position[...][None]
        x, extra = run_blocks(self.blocks, x, penalty=self.penalty, remat=self.remat, key=key, train=train)
        return {"logits": self.head(jnp.mean(self.norm(x), axis=1)), **extra}
