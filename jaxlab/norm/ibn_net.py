"""Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net (2018, arXiv 1807.09441).

Instance normalisation takes the appearance (colour, contrast, style) out of an image, batch normalisation keeps what
tells images apart. Appearance lives in shallow layers: there, and only there, a network gets both.

    IN       (x - mean_hw(x)) / sqrt(var_hw(x) + eps), of each image and channel, the same in training and test
    IBN      concat(IN(x[..., :h]), BN(x[..., h:])),  h = floor(ratio C)
    IBN-a    the norm behind the FIRST convolution of a residual branch is IBN; the identity path is left alone
    IBN-b    IN behind the addition, in front of the ReLU, at the end of the two first stages; and as the stem's norm
    D(A, B)  = mean over channels of KL(N_A || N_B) + KL(N_B || N_A), N the Gaussian of the spatially averaged channel

IBN-a stands in every stage but the last, IBN-b in the first two (of four).

Reconstructed: what "shallow" means in networks without four stages (for IBN-a all but the last, for IBN-b the first two
of these); a mask of real images; running variances are the biased ones of `batch_norm`; the ablation's variants "c" (IN
behind the branch's last norm, in front of the addition, where IBN-b has it behind) and "d" (a and b at once).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.norm.layer_norm import batch_norm, layer_norm
from jaxlab.ops.collectives import all_sum
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide, zero_where_false
from jaxlab.types import StatefulLayer

VARIANTS = ("none", "a", "b", "c", "d")


def instance_norm(
    x: Array, gain: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5, where: Array | None = None
) -> Array:
    """Returns `gain * (x - mean) / sqrt(var + eps) + bias`, mean and variance over the positions of an image's channel.

    Args:
        x: float [N, positions..., C]. A map of a single position has variance 0 and gives the bias: not for such maps.
        gain: float [C]; None = 1.
        bias: float [C]; None = 0.
        eps: >= 0, inside the root.
        where: bool [N], real images; the others come out as 0.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: `x` has no positions, or a shape does not fit.

    Example:
        >>> instance_norm(jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]]), eps=0.0)[..., 0].tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source:
        Ulyanov et al., arXiv 1607.08022; Pan et al., arXiv 1807.09441, section 3.1.
    """
    if x.ndim < 3:
        raise ValueError(f"x must be [N, positions..., C], got shape {x.shape}")
    for name, value in (("gain", gain), ("bias", bias)):
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {value.shape}, expected {x.shape[-1:]}, the channels of x")
    if where is not None and where.shape != x.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:1]}, one for each image")
    wide = zero_where_false(x, where).astype(compute_dtype(x))
    y = layer_norm(wide, axis=tuple(range(1, x.ndim - 1)), eps=eps)
    row = (1,) * (x.ndim - 1) + x.shape[-1:]
    y = y if gain is None else y * gain.astype(y.dtype).reshape(row)
    y = y if bias is None else y + bias.astype(y.dtype).reshape(row)
    return zero_where_false(y, where).astype(x.dtype)


def instance_batch_norm(
    *, ratio: float = 0.5, momentum: float = 0.9, eps: float = 1e-5, axis_name: str | None = None
) -> StatefulLayer:
    """Returns the IBN layer: instance normalisation of the first channels, batch normalisation of the others.

    Args:
        ratio: in [0, 1], share of the channels that instance normalisation gets, rounded down. 0 is batch, 1 instance
            normalisation.
        momentum: of the running statistics.
        eps: inside the roots.
        axis_name: mapped axis over which the images are spread: batch statistics of all shards.

    Returns:
        A `StatefulLayer`: `params, state = init(key, channels)`; `y, state = apply(params, state, x, where=None,
        train=False)` with x float `[N, positions..., channels]` and `where` bool `[N]`, real images.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> layer = instance_batch_norm()
        >>> params, state = layer.init(jax.random.key(0), 2)
        >>> x = jnp.array([[[1.0, 1.0], [3.0, 1.0]], [[10.0, 3.0], [30.0, 3.0]]])
        >>> y, _ = layer.apply(params, state, x, train=True)
        >>> y[..., 0].round(2).tolist(), y[..., 1].round(2).tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [[-1.0, -1.0], [1.0, 1.0]])

    Source:
        Pan et al., arXiv 1807.09441, section 3.2; code XingangPan/IBN-Net.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must be between 0 and 1")
    batch = batch_norm(momentum=momentum, eps=eps, axis_name=axis_name)

    def init(key, channels):
        half = int(channels * ratio)
        params, state = batch.init(key, channels - half)
        return {"instance": _gain_bias(half), "batch": params}, state

    def apply(params, state, x, *, where=None, train=False):
        half = params["instance"]["gain"].shape[0]
        if x.ndim < 3 or x.shape[-1] != half + params["batch"]["gain"].shape[0]:
            channels = half + params["batch"]["gain"].shape[0]
            raise ValueError(f"x has shape {x.shape}, expected [N, positions..., {channels}]")
        parts = []
        if half:
            parts.append(instance_norm(x[..., :half], **params["instance"], eps=eps, where=where))
        if half < x.shape[-1]:
            y, state = batch.apply(params["batch"], state, x[..., half:], where=_positions(where, x), train=train)
            parts.append(y)
        return jnp.concatenate(parts, axis=-1), state

    return StatefulLayer(init, apply)


def ibn_block(
    features: int,
    *,
    norm: StatefulLayer | None = None,
    after: str = "none",
    stride: int = 1,
    bottleneck: bool = True,
    momentum: float = 0.9,
    axis_name: str | None = None,
) -> StatefulLayer:
    """Returns a residual block of which the first norm can be replaced, with instance normalisation at its end.

    Bottleneck: conv1x1, norm, ReLU, conv3x3, BN, ReLU, conv1x1, BN; basic: conv3x3, norm, ReLU, conv3x3, BN. Then the
    addition and a ReLU. Where size or channels change, the identity path is a 1x1 convolution with BN.

    Args:
        features: channels inside; a bottleneck gives out four times as many.
        norm: behind the first convolution, such as `instance_batch_norm()` (IBN-a); None = batch normalisation.
        after: where instance normalisation stands at the end: "none", "addition" (behind it, IBN-b) or "branch" (in
            front of it, IBN-c).
        stride: of the 3x3 convolution (of the first of a basic block).
        bottleneck: which of the two blocks.
        momentum: of the running statistics.
        axis_name: mapped axis over which the images are spread.

    Returns:
        A `StatefulLayer`: `params, state = init(key, channels)`; `y, state = apply(params, state, x, where=None,
        train=False)`, x float `[N, H, W, channels]`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> block = ibn_block(4, norm=instance_batch_norm(), stride=2)
        >>> params, state = jax.jit(block.init, static_argnums=1)(jax.random.key(0), 3)
        >>> jax.jit(block.apply)(params, state, jnp.ones((2, 8, 8, 3)))[0].shape
        (2, 4, 4, 16)

    Source:
        Pan et al., arXiv 1807.09441, figure 3; code XingangPan/IBN-Net.
    """
    if features < 1 or stride < 1:
        raise ValueError(f"features={features} and stride={stride} must be at least 1")
    if after not in ("none", "addition", "branch"):
        raise ValueError(f"after={after!r} must be 'none', 'addition' or 'branch'")
    plain = batch_norm(momentum=momentum, axis_name=axis_name)
    first = plain if norm is None else norm
    outputs = 4 * features if bottleneck else features
    # (kernel, channels, stride) of each convolution of the branch.
    shapes = [(1, features, 1), (3, features, stride), (1, outputs, 1)]
    shapes = shapes if bottleneck else [(3, features, stride), (3, features, 1)]

    def init(key, channels):
        params, state = {}, {}
        keys = jax.random.split(key, len(shapes) + 1)
        inputs = channels
        for i, (kernel, size, _) in enumerate(shapes):
            params[f"conv_{i}"] = _kernel(keys[i], kernel, inputs, size)
            params[f"norm_{i}"], state[f"norm_{i}"] = (plain if i else first).init(keys[i], size)
            inputs = size
        if stride != 1 or channels != outputs:
            params["conv_identity"] = _kernel(keys[-1], 1, channels, outputs)
            params["norm_identity"], state["norm_identity"] = plain.init(keys[-1], outputs)
        if after != "none":
            params["norm_after"] = _gain_bias(outputs)
        return params, state

    def apply(params, state, x, *, where=None, train=False):
        new = {}

        def batch(name, y):
            y, new[name] = plain.apply(params[name], state[name], y, where=_positions(where, y), train=train)
            return y

        y = x
        for i, (_, _, step) in enumerate(shapes):
            y = _convolve(y if i == 0 else jax.nn.relu(y), params[f"conv_{i}"], step)
            if i == 0 and norm is not None:
                y, new["norm_0"] = norm.apply(params["norm_0"], state["norm_0"], y, where=where, train=train)
            else:
                y = batch(f"norm_{i}", y)
        if "conv_identity" in params:
            x = batch("norm_identity", _convolve(x, params["conv_identity"], stride))
        if after == "branch":
            return jax.nn.relu(x + instance_norm(y, **params["norm_after"], where=where)), new
        y = x + y
        y = instance_norm(y, **params["norm_after"], where=where) if after == "addition" else y
        return jax.nn.relu(y), new

    return StatefulLayer(init, apply)


def ibn_net(
    *,
    num_classes: int | None = 1000,
    variant: str = "a",
    layers: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    bottleneck: bool = True,
    ratio: float = 0.5,
    large_stem: bool = True,
    momentum: float = 0.9,
    axis_name: str | None = None,
) -> StatefulLayer:
    """Returns a residual network with instance normalisation in its shallow stages (by default ResNet-50-IBN-a).

    Args:
        num_classes: outputs of the last layer; None gives the averaged features instead.
        variant: "none", "a", "b", "c" or "d", see the module's docstring.
        layers: blocks of each stage; every stage but the first halves the size and doubles the channels.
        width: channels of the stem and inside the first stage.
        bottleneck: which blocks.
        ratio: of IBN.
        large_stem: a 7x7 convolution of stride 2 and a maximum over 3x3 of stride 2, for images of 100 pixels and more;
            otherwise a 3x3 convolution.
        momentum: of the running statistics.
        axis_name: mapped axis over which the images are spread.

    Returns:
        A `StatefulLayer`: `params, state = init(key, channels)`; `logits, state = apply(params, state, x, where=None,
        train=False, stages=False)`, x float `[N, H, W, channels]`, `where` bool `[N]`; with `stages=True`
        `(logits, [features of each stage])` for `feature_divergence`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> net = ibn_net(num_classes=10, layers=(1, 1), width=8, bottleneck=False, large_stem=False)
        >>> params, state = jax.jit(net.init, static_argnums=1)(jax.random.key(0), 3)
        >>> step = jax.jit(lambda params, state, x: net.apply(params, state, x, train=True))
        >>> logits, state = step(params, state, jnp.ones((2, 8, 8, 3)))
        >>> logits.shape
        (2, 10)

    Source:
        Pan et al., arXiv 1807.09441, section 3.3; code XingangPan/IBN-Net.
    """
    layers = tuple(layers)
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
    if not layers or min(layers) < 1 or width < 1:
        raise ValueError(f"layers={layers} and width={width} must be positive, with at least one stage")
    options = {"momentum": momentum, "axis_name": axis_name}
    mixed = instance_batch_norm(ratio=ratio, **options)
    blocks = {}
    for stage, number in enumerate(layers):
        shallow = stage < max(1, len(layers) - 1)
        for i in range(number):
            end = i == number - 1 and shallow and stage < 2
            blocks[f"block_{stage}_{i}"] = ibn_block(
                width * 2**stage,
                norm=mixed if variant in ("a", "d") and shallow else None,
                after={"b": "addition", "d": "addition", "c": "branch"}.get(variant, "none") if end else "none",
                stride=2 if stage and i == 0 else 1,
                bottleneck=bottleneck,
                **options,
            )
    plain, instance_stem = batch_norm(**options), variant in ("b", "d")
    head = None if num_classes is None else dense(num_classes)

    def init(key, channels):
        key_stem, key_head, *keys = jax.random.split(key, len(blocks) + 2)
        params, state = {"stem": _kernel(key_stem, 7 if large_stem else 3, channels, width)}, {}
        if instance_stem:
            params["norm"] = _gain_bias(width)
        else:
            params["norm"], state["norm"] = plain.init(key_stem, width)
        size = width
        for (name, block), key_block in zip(blocks.items(), keys, strict=True):
            params[name], state[name] = block.init(key_block, size)
            size = width * 2 ** int(name.split("_")[1]) * (4 if bottleneck else 1)
        if head is not None:
            params["head"] = head.init(key_head, size)
        return params, state

    def apply(params, state, x, *, where=None, train=False, stages=False):
        if x.ndim != 4:
            raise ValueError(f"x must be [N, H, W, channels], got shape {x.shape}")
        new, features = {}, []
        x = _convolve(zero_where_false(x, where), params["stem"], 2 if large_stem else 1)
        if instance_stem:
            x = instance_norm(x, **params["norm"], where=where)
        else:
            x, new["norm"] = plain.apply(params["norm"], state["norm"], x, where=_positions(where, x), train=train)
        x = jax.nn.relu(x)
        if large_stem:  # what is maximised is not negative, so that the padding may be 0
            pad = ((0, 0), (1, 1), (1, 1), (0, 0))
            x = jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pad)
        for stage, number in enumerate(layers):
            for i in range(number):
                name = f"block_{stage}_{i}"
                x, new[name] = blocks[name].apply(params[name], state[name], x, where=where, train=train)
            features.append(x)
        y = jnp.mean(x, axis=(1, 2), dtype=compute_dtype(x)).astype(x.dtype)
        y = y if head is None else head.apply(params["head"], y)
        y = zero_where_false(y, where)
        return ((y, features) if stages else y), new

    return StatefulLayer(init, apply)


def feature_divergence(
    a: Array,
    b: Array,
    *,
    where: Array | None = None,
    kv_where: Array | None = None,
    eps: float = 1e-6,
    axis_name: str | None = None,
) -> Array:
    """Returns how far a layer's features of two domains lie apart: the mean over channels of a symmetric KL divergence.

    `KL(A || B) + KL(B || A)` with `KL = log(s_B / s_A) + (s_A^2 + (m_A - m_B)^2) / (2 s_B^2) - 1/2`, m and s mean and
    standard deviation of the spatially averaged channel over the images.

    Args:
        a: float [N, ..., C], features of the images of one domain.
        b: float [M, ..., C], of the other.
        where: bool [N], real images of `a`.
        kv_where: bool [M], of `b`.
        eps: added to the variances, so that channels that never change stay finite.
        axis_name: mapped axis over which the images of both are spread.

    Returns:
        Scalar in the accumulation dtype, >= 0; 0 if either domain has no image.

    Raises:
        ValueError: the channels differ, or a mask does not fit.

    Example:
        >>> a = jnp.array([[-1.0], [1.0]])
        >>> feature_divergence(a, a + 1, eps=0.0).tolist()
        1.0

    Source:
        Pan et al., arXiv 1807.09441, section 4.4 and equation 1. eps is reconstructed.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must be [N, ..., C] and [M, ..., C], got {a.shape} and {b.shape}")
    for name, mask, x in (("where", where, a), ("kv_where", kv_where, b)):
        if mask is not None and mask.shape != x.shape[:1]:
            raise ValueError(f"{name} has shape {mask.shape}, expected {x.shape[:1]}, one for each image")
    mean_a, var_a, count_a = _channel_moments(a, where, eps, axis_name)
    mean_b, var_b, count_b = _channel_moments(b, kv_where, eps, axis_name)
    # The logarithms of the two directions cancel.
    shift = jnp.square(mean_a - mean_b)
    both = safe_divide(var_a + shift, var_b) + safe_divide(var_b + shift, var_a)
    divergence = jnp.mean(both / 2 - 1)
    return jnp.where((count_a > 0) & (count_b > 0), divergence, jnp.zeros_like(divergence))


def _channel_moments(x, where, eps, axis_name):
    wide = zero_where_false(x, where).astype(compute_dtype(x))
    averaged = jnp.mean(wide, axis=tuple(range(1, x.ndim - 1)))
    keep = jnp.ones(x.shape[:1], bool) if where is None else where
    count = all_sum(jnp.sum(keep, dtype=wide.dtype), axis_name)
    mean = safe_divide(all_sum(masked_sum(averaged, keep, axis=0), axis_name), count)
    square = jnp.square(averaged - mean[None])
    return mean, safe_divide(all_sum(masked_sum(square, keep, axis=0), axis_name), count) + eps, count


def _positions(where: Array | None, x: Array) -> Array | None:
    """Returns the mask of images as one of positions, as `batch_norm` wants it."""
    return None if where is None else jnp.broadcast_to(where.reshape((-1,) + (1,) * (x.ndim - 2)), x.shape[:-1])


def _gain_bias(size: int) -> dict[str, Array]:
    return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}


def _kernel(key: Array, kernel: int, inputs: int, outputs: int) -> Array:
    """Returns a convolution's weights `[kernel, kernel, inputs, outputs]`, He's normal for the fan out."""
    scale = (2.0 / (kernel * kernel * outputs)) ** 0.5
    return jax.random.normal(key, (kernel, kernel, inputs, outputs)) * scale


def _convolve(x: Array, w: Array, stride: int) -> Array:
    pad = (w.shape[0] // 2, w.shape[0] // 2)
    return jax.lax.conv_general_dilated(
        x, w.astype(x.dtype), (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
