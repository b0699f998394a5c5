"""Dual Mutual Learning Network with Global-local Awareness for RGB-D Salient Object Detection (GL-DMNet).

2025, arXiv 2501.01648. Colour and depth see an object differently and fail at different times. Each stream's features
are refined by what the OTHER stream attends to, and a cascade of transformer blocks rebuilds the mask.

    position  A_m = softmax(Q_m K_m^T / sqrt(C / 8)) of stream m in {r, d},   g_r = A_d V_r,   g_d = A_r V_d
    channel   S_m = softmax(X_m^T X_m / sqrt(N)),                             g_r = X_r S_d,   g_d = X_d S_r
    stream    out_m = m + gamma_m g_m + local_m,   gamma_m starts at 0
    local     position: relu(norm(depthwise 3x3 m));   channel: m sigmoid(MLP(mean of the other stream))
    fused     dense([out_r, out_d, out_r out_d])
    decoder   from the deepest level: transformer block; then up by two, join the fused level, 3x3, transformer block
    loss      sum over levels of BCE + 1 - IoU_soft, each map resized to the mask

Reconstructed: all equations inside the blocks (the paper's code is not out; they follow the usual dual attention), no
normalisation over the batch, position fusion on the shallower half of the levels and channel fusion on the deeper one.
The four metrics are those of the saliency literature.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels import attention
from jaxlab.ops.layers import dense, feature_norm, mlp
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.types import Layer

STREAMS = ("rgb", "depth")


def gl_dmnet(
    levels: Sequence[int] = (16, 32, 64),
    *,
    width: int = 32,
    exchange: float | Array = 1.0,
    branches: float | Array = 1.0,
    backbone: Layer | None = None,
) -> Layer:
    """Returns the network from a colour and a depth image to maps of how salient each place is.

    Args:
        levels: channels of the backbone's levels, shallow to deep; each halves the image.
        width: channels of the decoder.
        exchange: see `position_mutual_fusion`.
        branches: see `position_mutual_fusion`.
        backbone: `init(key, channels)`, `apply(params, image)` gives one [B, H_l, W_l, levels[l]] a level; None = a 3x3
            convolution of stride 2 a level. Both streams have one, with weights of their own.

    Returns:
        A `Layer`: `init(key, rgb_channels, depth_channels)`, `apply(params, rgb [B, H, W, .], depth [B, H, W, .])`
        gives logits, one [B, H_l, W_l] a level, shallow to deep; the first is the answer.

    Raises:
        ValueError: `levels` is empty or a size is below 1.

    Example:
        >>> net = gl_dmnet((2, 4), width=4)
        >>> run = lambda key, image: net.apply(net.init(key, 3, 1), image, image[..., :1])
        >>> [z.shape for z in jax.eval_shape(run, jax.random.key(0), jnp.ones((1, 8, 8, 3)))]
        [(1, 4, 4), (1, 2, 2)]

    Source:
        Yi et al., arXiv 2501.01648 (reconstructed).
    """
    levels = tuple(levels)
    if not levels or min(*levels, width) < 1:
        raise ValueError(f"levels={levels} must not be empty, and they and width={width} must be at least 1")
    streams = _convolutions(levels) if backbone is None else backbone
    options = {"exchange": exchange, "branches": branches}
    shallow = (len(levels) + 1) // 2
    fusions = [position_mutual_fusion(**options)] * shallow
    fusions += [channel_mutual_fusion(**options)] * (len(levels) - shallow)
    decoder = cascade_decoder(width)

    def init(key, rgb_channels, depth_channels):
        keys = jax.random.split(key, 3 + len(levels))
        fused = {f"level_{i}": f.init(keys[3 + i], levels[i]) for i, f in enumerate(fusions)}
        both = {n: streams.init(k, c) for n, k, c in zip(STREAMS, keys, (rgb_channels, depth_channels), strict=False)}
        return {"backbone": both, "fusion": fused, "decoder": decoder.init(keys[2], *levels)}

    def apply(params, rgb, depth):
        r, d = (streams.apply(params["backbone"][n], x) for n, x in zip(STREAMS, (rgb, depth), strict=True))
        fused = [f.apply(params["fusion"][f"level_{i}"], r[i], d[i]) for i, f in enumerate(fusions)]
        return decoder.apply(params["decoder"], fused)

    return Layer(init, apply)


def position_mutual_fusion(
    *, reduction: int = 8, exchange: float | Array = 1.0, branches: float | Array = 1.0
) -> Layer:
    """Returns the fusion in which each stream gathers from where the other one looks, see the module's docstring.

    Args:
        reduction: queries and keys have `C / reduction` channels, at least one.
        exchange: share of the other stream's attention in the mixture with one's own; 1 = mutual, 0 = usual attention.
        branches: factor of both branches; 0 leaves plain concatenation.

    Returns:
        A `Layer`: `init(key, C)`, `apply(params, rgb, depth)` with [B, H, W, C] each gives [B, H, W, C].

    Raises:
        ValueError: `reduction` is below 1; in `apply`, shapes differ.

    Example:
        >>> layer = position_mutual_fusion()
        >>> run = lambda key, x: layer.apply(layer.init(key, 4), x, x)
        >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((1, 3, 2, 4))).shape
        (1, 3, 2, 4)

    Source:
        Yi et al., arXiv 2501.01648, position mutual fusion (reconstructed).
    """
    if reduction < 1:
        raise ValueError(f"reduction={reduction} must be at least 1")
    norm = feature_norm()

    def init(key, channels):
        inner, params = max(channels // reduction, 1), {}
        key, key_fuse = jax.random.split(key)
        for name, key_stream in zip(STREAMS, jax.random.split(key), strict=True):
            keys = jax.random.split(key_stream, 4)
            sizes = {"q": inner, "k": inner, "v": channels}
            params[name] = {n: dense(s).init(k, channels) for (n, s), k in zip(sizes.items(), keys, strict=False)}
            params[name]["local"] = jax.random.normal(keys[3], (3, 3, 1, channels)) / 3
            params[name]["norm"] = norm.init(None, channels)
            params[name]["gamma"] = jnp.zeros(())
        return {**params, "fuse": dense(channels).init(key_fuse, 3 * channels)}

    def apply(params, rgb, depth):
        _check_streams(rgb, depth)
        inputs, affinity, values = {"rgb": rgb, "depth": depth}, {}, {}
        for name, x in inputs.items():
            flat, own = x.reshape(len(x), -1, x.shape[-1]), params[name]
            q, k, values[name] = (dense(own[n]["w"].shape[1]).apply(own[n], flat) for n in ("q", "k", "v"))
            scores = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=compute_dtype(x)) / q.shape[-1] ** 0.5
            affinity[name] = jax.nn.softmax(scores)
        outs = []
        for name, other in zip(STREAMS, STREAMS[::-1], strict=True):
            x, own = inputs[name], params[name]
            seen = exchange * affinity[other] + (1 - exchange) * affinity[name]
            far = jnp.einsum("bnm,bmc->bnc", seen, values[name].astype(seen.dtype)).reshape(x.shape)
            near = _convolve(x, own["local"])
            near = jax.nn.relu(norm.apply(own["norm"], near))
            outs.append(x + (branches * (own["gamma"] * far + near)).astype(x.dtype))
        return _fuse(params["fuse"], *outs)

    return Layer(init, apply)


def channel_mutual_fusion(*, ratio: int = 4, exchange: float | Array = 1.0, branches: float | Array = 1.0) -> Layer:
    """Returns the fusion in which each stream's channels mix as the other's are alike, see the module's docstring.

    Args:
        ratio: the gate has `C / ratio` hidden units, at least one.
        exchange: see `position_mutual_fusion`; of the gate's mean too.
        branches: see `position_mutual_fusion`.

    Returns:
        A `Layer` as `position_mutual_fusion`.

    Raises:
        ValueError: `ratio` is below 1; in `apply`, shapes differ.

    Example:
        >>> layer = channel_mutual_fusion()
        >>> run = lambda key, x: layer.apply(layer.init(key, 4), x, x)
        >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((1, 3, 2, 4))).shape
        (1, 3, 2, 4)

    Source:
        Yi et al., arXiv 2501.01648, channel mutual fusion (reconstructed; the plain form of the affinity).
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 1")

    def gate(channels):
        return mlp([max(channels // ratio, 1), channels])

    def init(key, channels):
        keys = dict(zip((*STREAMS, "fuse"), jax.random.split(key, 3), strict=True))
        params = {n: {"gate": gate(channels).init(keys[n], channels), "gamma": jnp.zeros(())} for n in STREAMS}
        return {**params, "fuse": dense(channels).init(keys["fuse"], 3 * channels)}

    def apply(params, rgb, depth):
        _check_streams(rgb, depth)
        inputs = {"rgb": rgb, "depth": depth}
        flat = {n: x.reshape(len(x), -1, x.shape[-1]).astype(compute_dtype(x)) for n, x in inputs.items()}
        affinity = {n: jax.nn.softmax(jnp.einsum("bnc,bne->bce", x, x) / x.shape[1] ** 0.5) for n, x in flat.items()}
        outs = []
        for name, other in zip(STREAMS, STREAMS[::-1], strict=True):
            x, own = inputs[name], params[name]
            alike = exchange * affinity[other] + (1 - exchange) * affinity[name]
            far = jnp.einsum("bce,bne->bnc", alike, flat[name]).reshape(x.shape)
            mean = exchange * jnp.mean(flat[other], axis=1) + (1 - exchange) * jnp.mean(flat[name], axis=1)
            near = x * jax.nn.sigmoid(gate(x.shape[-1]).apply(own["gate"], mean))[:, None, None, :].astype(x.dtype)
            outs.append(x + (branches * (own["gamma"] * far + near)).astype(x.dtype))
        return _fuse(params["fuse"], *outs)

    return Layer(init, apply)


def cascade_decoder(width: int, *, num_heads: int = 4, max_tokens: int = 256) -> Layer:
    """Returns the decoder that goes from the deepest level to the shallowest and gives a map at each.

    Args:
        width: channels, divisible by `num_heads`.
        num_heads: of the transformer blocks.
        max_tokens: levels with more places have no transformer block, whose cost grows with their square.

    Returns:
        A `Layer`: `init(key, *channels)`, one number a level; `apply(params, features)` with [B, H_l, W_l, C_l] from
        shallow to deep gives logits [B, H_l, W_l] in the same order.

    Raises:
        ValueError: `width` is not divisible by `num_heads`.

    Example:
        >>> decoder = cascade_decoder(4)
        >>> run = lambda key, x: decoder.apply(decoder.init(key, 4, 4), [x, x[:, ::2, ::2]])
        >>> [z.shape for z in jax.eval_shape(run, jax.random.key(0), jnp.ones((1, 4, 4, 4)))]
        [(1, 4, 4), (1, 2, 2)]

    Source:
        Yi et al., arXiv 2501.01648, cascade transformer-infused reconstruction (reconstructed).
    """
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"width={width} must be positive and divisible by num_heads={num_heads}")
    block, head, norm = _transformer_block(width, num_heads), dense(1), feature_norm()

    def init(key, *channels):
        params = {}
        for i, (size, key_level) in enumerate(zip(channels, jax.random.split(key, len(channels)), strict=True)):
            key_join, key_block, key_head = jax.random.split(key_level, 3)
            inputs = size + (width if i < len(channels) - 1 else 0)
            join = jax.random.normal(key_join, (3, 3, inputs, width)) * (2 / (9 * inputs)) ** 0.5
            parts = {"join": join, "norm": norm.init(None, width), "block": block.init(key_block)}
            params[f"level_{i}"] = {**parts, "head": head.init(key_head, width)}
        return params

    def apply(params, features):
        maps, x = [], None
        for i in reversed(range(len(features))):
            own, level = params[f"level_{i}"], features[i]
            if x is not None:
                shape = (*level.shape[:3], width)
                level = jnp.concatenate([jax.image.resize(x, shape, "bilinear").astype(level.dtype), level], axis=-1)
            x = jax.nn.relu(norm.apply(own["norm"], _convolve(level, own["join"])))
            if x.shape[1] * x.shape[2] <= max_tokens:
                x = block.apply(own["block"], x.reshape(len(x), -1, width)).reshape(x.shape)
            maps.insert(0, head.apply(own["head"], x)[..., 0])
        return maps

    return Layer(init, apply)


def saliency_loss(
    side_logits: Sequence[Array],
    mask: Array,
    *,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far the maps of all levels are from the mask.

    `sum_l BCE(z_l, mask) + 1 - soft_iou(sigmoid(z_l), mask)`, each map resized to the mask.

    Args:
        side_logits: float [B, H_l, W_l], one a level.
        mask: float [B, H, W] in [0, 1].
        where: bool [B], real images.
        axis_name: mapped axis over which the images are spread.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of the logits.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> mask = jnp.array([[[1.0, 0.0]]])
        >>> loss = jax.jit(saliency_loss)
        >>> round(float(loss([40 * mask - 20], mask)), 4), round(float(loss([0 * mask], mask)), 4)
        (0.0, 1.0931)

    Source:
        Yi et al., arXiv 2501.01648 (the paper's weights reconstructed as 1).
    """
    total, where_shape = jnp.zeros((), compute_dtype(*side_logits)), mask.shape[:1]
    if where is not None and where.shape != where_shape:
        raise ValueError(f"where has shape {where.shape}, expected {where_shape}")
    if mask.ndim != 3 or not side_logits or any(z.ndim != 3 or len(z) != len(mask) for z in side_logits):
        shapes = [z.shape for z in side_logits]
        raise ValueError(f"mask must be [B, H, W] and side_logits [B, h, w] each, got {mask.shape} and {shapes}")
    goal = zero_where_false(mask, where).astype(total.dtype)
    terms = jnp.zeros(len(mask), total.dtype)
    for logits in side_logits:
        z = zero_where_false(logits, where).astype(total.dtype)
        z = z if z.shape == goal.shape else jax.image.resize(z, goal.shape, "bilinear")
        entropy = -goal * jax.nn.log_sigmoid(z) - (1 - goal) * jax.nn.log_sigmoid(-z)
        terms = terms + jnp.mean(entropy, axis=(1, 2)) + 1 - soft_iou(jax.nn.sigmoid(z), goal)
    return reduce_terms(terms, where, reduction=reduction, axis_name=axis_name, dtype=side_logits[0].dtype)


def soft_iou(probs: Array, mask: Array, *, eps: float = 1.0) -> Array:
    """Returns each image's intersection over union, of probabilities.

    `(sum p G + eps) / (sum (p + G - p G) + eps)`.

    Args:
        probs: float [B, H, W].
        mask: float [B, H, W].
        eps: smoothing in pixels; an empty mask without a find gives 1.

    Returns:
        [B] in the accumulation dtype.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> jax.jit(soft_iou)(jnp.array([[[1.0, 1.0]]]), jnp.array([[[1.0, 0.0]]]), eps=0.0).tolist()
        [0.5]
    """
    p, goal = _same(probs, mask)
    both = jnp.sum(p * goal, axis=(1, 2))
    return (both + eps) / (jnp.sum(p + goal, axis=(1, 2)) - both + eps)


def saliency_mae(probs: Array, mask: Array, *, where: Array | None = None) -> Array:
    """Returns the mean absolute error of a saliency map.

    Args:
        probs: float [B, H, W] in [0, 1].
        mask: float [B, H, W].
        where: bool [B], real images.

    Returns:
        Scalar in the accumulation dtype.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> float(jax.jit(saliency_mae)(jnp.array([[[1.0, 0.5]]]), jnp.array([[[1.0, 0.0]]])))
        0.25
    """
    p, goal = _same(probs, mask)
    return masked_mean(jnp.mean(jnp.abs(p - goal), axis=(1, 2)), where)


def max_f_beta(
    probs: Array, mask: Array, *, beta2: float = 0.3, thresholds: int = 255, where: Array | None = None
) -> Array:
    """Returns the best F measure over all thresholds, of precision and recall that are means over the images.

    `max_t (1 + b) P_t R_t / (b P_t + R_t)`, a place being found at `probs >= t`, `t = 1 / thresholds .. 1`.

    Args:
        probs: float [B, H, W] in [0, 1].
        mask: float [B, H, W], an object where it is above 1/2.
        beta2: b, weight of the recall.
        thresholds: their number.
        where: bool [B], real images.

    Returns:
        Scalar in the accumulation dtype; no gradient.

    Raises:
        ValueError: shapes differ or `thresholds` is below 1.

    Example:
        >>> float(jax.jit(max_f_beta)(jnp.array([[[0.9, 0.1]]]), jnp.array([[[1.0, 0.0]]])))
        1.0

    Source:
        Achanta et al., Frequency-tuned Salient Region Detection (2009), beta2 = 0.3.
    """
    if thresholds < 1:
        raise ValueError(f"thresholds={thresholds} must be at least 1")
    p, goal = _same(jax.lax.stop_gradient(probs), mask)
    there = (goal > 0.5).astype(p.dtype)
    objects = jnp.sum(there, axis=(1, 2))

    def at(threshold):
        found = (p >= threshold).astype(p.dtype)
        hits = jnp.sum(found * there, axis=(1, 2))
        precision = masked_mean(safe_divide(hits, jnp.sum(found, axis=(1, 2))), where)
        recall = masked_mean(safe_divide(hits, objects), where)
        return safe_divide((1 + beta2) * precision * recall, beta2 * precision + recall)

    return jnp.max(jax.lax.map(at, jnp.arange(1, thresholds + 1, dtype=p.dtype) / thresholds))


def s_measure(probs: Array, mask: Array, *, alpha: float = 0.5, where: Array | None = None) -> Array:
    """Returns how alike map and mask are in structure, of objects and of regions.

    `alpha S_object + (1 - alpha) S_region`: the object's and the background's mean and spread; the structural
    similarity of the four quarters about the object's centre. Without object `1 - mean p`, without background `mean p`.

    Args:
        probs: float [B, H, W] in [0, 1].
        mask: float [B, H, W], an object where it is above 1/2.
        alpha: in [0, 1].
        where: bool [B], real images.

    Returns:
        Scalar in the accumulation dtype, at least 0.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> mask = jnp.zeros((1, 6, 6)).at[0, 1:4, 2:5].set(1.0)
        >>> round(float(jax.jit(s_measure)(mask, mask)), 4)
        1.0

    Source:
        Fan et al., Structure-measure, arXiv 1708.00786.
    """
    p, goal = _same(probs, mask)
    values = jax.vmap(lambda p, g: _structure(p, (g > 0.5).astype(p.dtype), alpha))(zero_where_false(p, where), goal)
    return masked_mean(values, where)


def e_measure(probs: Array, mask: Array, *, eps: float = 1e-8, where: Array | None = None) -> Array:
    """Returns how well map and mask are aligned, place by place and as wholes.

    `mean (1 + 2 a b / (a^2 + b^2 + eps))^2 / 4` with a and b map and mask less their means. Without object
    `1 - mean p`, without background `mean p`.

    Args:
        probs: float [B, H, W] in [0, 1].
        mask: float [B, H, W], an object where it is above 1/2.
        eps: keeps a place where both are average from dividing by zero.
        where: bool [B], real images.

    Returns:
        Scalar in the accumulation dtype.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> mask, measure = jnp.array([[[1.0, 0.0]]]), jax.jit(e_measure)
        >>> round(float(measure(mask, mask)), 4), round(float(measure(1 - mask, mask)), 4)
        (1.0, 0.0)

    Source:
        Fan et al., Enhanced-alignment Measure, arXiv 1805.10421.
    """
    p, goal = _same(probs, mask)
    goal = (goal > 0.5).astype(p.dtype)
    p = zero_where_false(p, where)
    mean = lambda x: jnp.mean(x, axis=(1, 2))
    share = mean(goal)
    a, b = p - mean(p)[:, None, None], goal - share[:, None, None]
    values = mean(jnp.square(1 + 2 * a * b / (a * a + b * b + eps))) / 4
    values = jnp.where(share == 0, 1 - mean(p), jnp.where(share == 1, mean(p), values))
    return masked_mean(values, where)


def _structure(p, goal, alpha, eps=1e-8):
    """Returns the S-measure of one image [H, W]."""
    height, width = p.shape
    share = jnp.mean(goal)

    def alike(x, inside):
        """Mean and spread of x over the places inside, which should be all ones."""
        count = jnp.sum(inside)
        mean = safe_divide(jnp.sum(x * inside), count)
        square = jnp.sum(jnp.square(x - mean) * inside) / jnp.maximum(count - 1, 1)
        return 2 * mean / (mean * mean + 1 + jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0) + eps)

    objects = share * alike(p, goal) + (1 - share) * alike(1 - p, 1 - goal)
    row, column = jnp.arange(height, dtype=p.dtype)[:, None], jnp.arange(width, dtype=p.dtype)[None, :]
    total = jnp.maximum(jnp.sum(goal), 1)
    # The centre counts from one, as in the authors' program.
    top = row < jnp.round(jnp.sum(goal * (row + 1)) / total)
    left = column < jnp.round(jnp.sum(goal * (column + 1)) / total)

    def region(inside):
        inside = inside.astype(p.dtype)
        count = jnp.sum(inside)
        x, y = (safe_divide(jnp.sum(v * inside), count) for v in (p, goal))
        spread = lambda a, b: jnp.sum(a * b * inside) / jnp.maximum(count - 1, 1)
        xx, yy, xy = spread(p - x, p - x), spread(goal - y, goal - y), spread(p - x, goal - y)
        upper, lower = 4 * x * y * xy, (x * x + y * y) * (xx + yy)
        similar = jnp.where(upper != 0, upper / (lower + eps), (lower == 0).astype(p.dtype))
        return jnp.where(count > 0, similar, 0.0) * count / (height * width)

    regions = sum(region(a & b) for a in (top, ~top) for b in (left, ~left))
    value = jnp.maximum(alpha * objects + (1 - alpha) * regions, 0)
    return jnp.where(share == 0, 1 - jnp.mean(p), jnp.where(share == 1, jnp.mean(p), value))


def _transformer_block(width, num_heads):
    project, out, feed, norm = dense(3 * width), dense(width), mlp([2 * width, width]), feature_norm()

    def init(key):
        keys = jax.random.split(key, 3)
        params = {"project": project.init(keys[0], width), "out": out.init(keys[1], width)}
        return {**params, "feed": feed.init(keys[2], width), "first": norm.init(None, width),
                "second": norm.init(None, width)}  # fmt: skip

    def apply(params, x):
        shape = (*x.shape[:2], num_heads, width // num_heads)
        q, k, v = jnp.split(project.apply(params["project"], norm.apply(params["first"], x)), 3, axis=-1)
        seen = attention(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(x.shape)
        x = x + out.apply(params["out"], seen)
        return x + feed.apply(params["feed"], norm.apply(params["second"], x))

    return Layer(init, apply)


def _convolutions(levels):
    norm = feature_norm()

    def init(key, channels):
        sizes, params = (channels, *levels), {}
        for i, k in enumerate(jax.random.split(key, len(levels))):
            weights = jax.random.normal(k, (3, 3, sizes[i], sizes[i + 1])) * (2 / (9 * sizes[i])) ** 0.5
            params[f"level_{i}"] = {"w": weights, "norm": norm.init(None, sizes[i + 1])}
        return params

    def apply(params, x):
        features = []
        for i in range(len(levels)):
            own = params[f"level_{i}"]
            x = jax.nn.relu(norm.apply(own["norm"], _convolve(x, own["w"], stride=2)))
            features.append(x)
        return features

    return Layer(init, apply)


def _convolve(x, w, *, stride=1):
    """Returns a 3x3 convolution with zeros around, of each channel on its own if the kernel has one input.

    It is nine shifted copies and one product: many small networks at once (`vmap`) then stay fast on a CPU too.
    """
    wide = jnp.pad(x.astype(compute_dtype(x)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    w = w.astype(wide.dtype)
    height, width = x.shape[1:3]
    shifted = [wide[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    if w.shape[2] == 1 and x.shape[-1] > 1:
        out = sum(part * w[divmod(n, 3)].reshape(1, 1, 1, -1) for n, part in enumerate(shifted))
    else:
        out = jnp.concatenate(shifted, axis=-1) @ w.reshape(-1, w.shape[-1])
    return out.astype(x.dtype)


def _fuse(params, r, d):
    return dense(r.shape[-1]).apply(params, jnp.concatenate([r, d, r * d], axis=-1))


def _check_streams(rgb, depth):
    if rgb.ndim != 4 or depth.shape != rgb.shape:
        raise ValueError(f"rgb and depth must both be [B, H, W, C], got {rgb.shape} and {depth.shape}")


def _same(probs, mask):
    if probs.ndim != 3 or mask.shape != probs.shape:
        raise ValueError(f"probs and mask must both be [B, H, W], got {probs.shape} and {mask.shape}")
    dtype = compute_dtype(probs, mask)
    return probs.astype(dtype), mask.astype(dtype)
