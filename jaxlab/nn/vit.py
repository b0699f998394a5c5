"""A vision transformer whose feed-forward layers can be sparse mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlab.kernels.attention import attention
from jaxlab.ops.layers import dense, feature_norm, mlp
from jaxlab.types import Layer, RoutingPlan, accepted


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
    if width % heads:
        raise ValueError(f"heads={heads} must divide width={width}")
    feed_forward = (lambda: mlp([4 * width, width], activation=jax.nn.gelu)) if feed_forward is None else feed_forward
    embed, head, norm = dense(width), dense(num_classes), feature_norm()
    qkv, out = dense(3 * width, bias=False), dense(width, scale=0.25)
    ffs = [feed_forward() for _ in range(depth)]

    def grid(shape):
        h, w = shape[-3], shape[-2]
        if h % patch or w % patch:
            raise ValueError(f"patch={patch} must divide the image, which is {h} x {w}")
        return h // patch, w // patch

    def init(key, image):
        shape = getattr(image, "shape", image)
        rows, cols = grid(shape)
        keys = jax.random.split(key, depth + 3)
        params = {
            "embed": embed.init(keys[0], patch * patch * shape[-1]),
            "position": 0.02 * jax.random.normal(keys[1], (rows * cols, width)),
            "norm": norm.init(keys[2], width),
            "head": head.init(keys[2], width),
        }
        for i, ff in enumerate(ffs):
            key_qkv, key_out, key_ff = jax.random.split(keys[3 + i], 3)
            params[f"block_{i}"] = {
                "norm_attention": norm.init(key, width),
                "qkv": qkv.init(key_qkv, width),
                "out": out.init(key_out, width),
                "norm_ff": norm.init(key, width),
                "ff": ff.init(key_ff, width),
            }
        return params

    def apply(params, x, *, key=None, train=False):
        n, c = x.shape[0], x.shape[3]
        rows, cols = grid(x.shape)
        x = x.reshape(n, rows, patch, cols, patch, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * cols, -1)
        x = embed.apply(params["embed"], x) + params["position"][None]
        tokens = rows * cols
        plans = []
        for i, ff in enumerate(ffs):
            p = params[f"block_{i}"]
            y = qkv.apply(p["qkv"], norm.apply(p["norm_attention"], x)).reshape(n, tokens, 3, heads, width // heads)
            y = attention(y[:, :, 0], y[:, :, 1], y[:, :, 2]).reshape(n, tokens, width)
            x = x + out.apply(p["out"], y)
            flat = norm.apply(p["norm_ff"], x).reshape(n * tokens, width)
            block_key = None if key is None else jax.random.fold_in(key, i)
            y = ff.apply(p["ff"], flat, **accepted(ff.apply, key=block_key, train=train))
            if isinstance(y, tuple):
                y, plan = y
                plans.append(plan)
            x = x + y.reshape(n, tokens, width)
        pooled = jnp.mean(norm.apply(params["norm"], x), axis=1)
        output = {"logits": head.apply(params["head"], pooled)}
        if plans:
            output["expert_counts"] = jnp.stack([plan.counts for plan in plans])
            if penalty is not None:
                output["penalty"] = jnp.mean(jnp.stack([penalty(plan) for plan in plans]))
        return output

    return Layer(init, apply)
