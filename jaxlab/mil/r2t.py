"""Feature Re-Embedding: Towards Foundation Model-Level Performance in Computational Pathology (R2T, 2024).

arXiv 2402.17228. A block between the projection of instances and the pooling of the bag, which trains features of an
offline network online at linear cost: attention inside square regions, with a convolution on the attention logits that
encodes positions, then attention across regions through a few representatives of each.

    square     the bag's L instances, in their order, fill a square of side s, the least multiple of R with s^2 >= L
    R-MSA      u <- u + MSA(norm(u)) inside each of R^2 regions, with logits A + conv(A): depthwise over heads, k taps
               along the queries
    CR-MSA     S = (X phi)^T [K, P] in each region of P places;  C = softmax over P;  D = softmax over K;
               M = (S - min_P) / (max_P - min_P + 1e-8);   rep = C X;   rep' = MSA over the regions, for each of the K
               u_p <- u_p + sum_k rep'_k M_kp D_kp
    end        (u + input, if `shortcut`), norm

Order matters: an instance's place in the bag is its place on the slide. Each bag has the square of its own number of
instances, so that padding, wherever it stands, changes nothing.

Reconstructed: places of the square that no instance fills are hidden from attention, from the softmax over P and from
the minimum and maximum (`mask_padding=False` is the official code, where zeros fill them after the norm).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.mil.models import at_least_one, dropped, xavier_dense
from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.layers import feature_norm
from jaxlab.ops.masked import compute_dtype, masked_softmax, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def r2t(
    *,
    regions: int = 8,
    layers: int = 2,
    heads: int = 8,
    taps: int = 15,
    representatives: int = 3,
    cross_regions: int = 8,
    cross_heads: int = 8,
    shortcut: bool = False,
    dropout: float = 0.1,
    mask_padding: bool = True,
) -> Layer:
    """Returns the re-embedded regional transformer, features in and features out.

    Args:
        regions: R, regions along each side in R-MSA.
        layers: number of layers, the last of which is CR-MSA.
        heads: of R-MSA; must divide D.
        taps: k, odd, of the convolution on the logits; 0 = none.
        representatives: K, of each region in CR-MSA.
        cross_regions: regions along each side in CR-MSA.
        cross_heads: of CR-MSA; must divide D.
        shortcut: whether the input is added before the last norm.
        dropout: of the attentions' results in training, in [0, 1).
        mask_padding: whether empty places are hidden.

    Returns:
        A `Layer`: `params = init(key, D)`; `apply(params, x, where=, segment_ids=, num_segments=, max_length=None,
        key=None, train=False)`, x [B, L, D] or [T, D], gives the same shape, 0 on padding. A list should state
        `max_length`, a bound on the instances of a bag (default T): memory is that of B bags of this length, and what
        exceeds it is 0. Use it before a bag model: `abmil(2).apply(params, r2t().apply(...), where=where)`.

    Raises:
        ValueError: an option is out of range; in `init`, the heads do not divide D; in `apply`, shapes do not fit or
            the key is missing.

    Example:
        >>> layer = r2t(regions=2, heads=2, taps=3, cross_regions=2, cross_heads=2)
        >>> jax.eval_shape(lambda key: layer.apply(layer.init(key, 4), jnp.ones((1, 10, 4))), jax.random.key(0)).shape
        (1, 10, 4)

    Source:
        Tang et al., arXiv 2402.17228; code DearCaat/RRT-MIL, `modules/rmsa.py` and `rrt.py` (its defaults; it tunes k
        from 9 to 21, K from 1 to 5, and the shortcut).
    """
    at_least_one(regions=regions, layers=layers, heads=heads, representatives=representatives)
    at_least_one(cross_regions=cross_regions, cross_heads=cross_heads)
    if taps < 0 or (taps and taps % 2 == 0):
        raise ValueError(f"taps={taps} must be 0 or odd")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")
    norm = feature_norm(eps=1e-5)

    def attention(key, size, heads, taps):
        keys = jax.random.split(key, 3)
        params = {"qkv": xavier_dense(3 * size).init(keys[0], size), "out": xavier_dense(size).init(keys[1], size)}
        if taps:  # Xavier-normal for a depthwise kernel of `taps` inputs and outputs
            params["conv"] = {"w": jax.random.normal(keys[2], (heads, taps)) * taps**-0.5, "b": jnp.zeros(heads)}
        return params

    def init(key, size):
        for name, number in (("heads", heads), ("cross_heads", cross_heads)):
            if size % number:
                raise ValueError(f"{name}={number} must divide the number of features {size}")
        keys = jax.random.split(key, layers + 1)
        params = {"norm": norm.init(keys[0], size)}
        for i in range(layers - 1):
            params[f"layer_{i}"] = {"norm": norm.init(keys[0], size), **attention(keys[i], size, heads, taps)}
        bound = size**-0.5  # Kaiming-uniform with a = sqrt(5); the code takes K for the inputs, which is not meant
        phi = jax.random.uniform(keys[-1], (size, representatives), minval=-bound, maxval=bound)
        cross = {"norm": norm.init(keys[0], size), "phi": phi, **attention(keys[-2], size, cross_heads, 0)}
        return {**params, "cross": cross}

    def apply(
        params,
        x,
        *,
        where=None,
        segment_ids=None,
        num_segments=None,
        max_length=None,
        key=None,
        train=False,
    ):
        bags = group(x, where, segment_ids, num_segments)
        noisy = train and dropout > 0
        if noisy and key is None:
            raise ValueError("dropout in training needs a key")
        keys = list(jax.random.split(key, layers)) if noisy else [None] * layers
        length = max_length or x.shape[-2]
        return rows_mixed(run)(params, zero_where_false(x, bags.keep), bags, keys, length=length)

    def run(params, x, bags, keys, *, length):
        def dropped_out(key, y):
            return y if key is None else dropped(key, y, dropout)

        own, cross = (_Places(bags, length, number) for number in (regions, cross_regions))
        u = x
        for i in range(layers - 1):
            p = params[f"layer_{i}"]
            y = own.fill(zero_where_false(norm.apply(p["norm"], u), bags.keep))
            y = _self_attention(p, y, own.there if mask_padding else own.exists, heads)
            u = u + dropped_out(keys[i], own.take(y, x.shape))
        p = params["cross"]
        y = cross.fill(zero_where_false(norm.apply(p["norm"], u), bags.keep))
        y = _across_regions(p, y, cross.there if mask_padding else cross.exists, cross_heads)
        u = u + dropped_out(keys[-1], cross.take(y, x.shape))
        u = u + x if shortcut else u
        return zero_where_false(norm.apply(params["norm"], u), bags.keep & own.inside(x.shape))

    return Layer(init, apply)


def region_partition(x: Array, regions: int) -> Array:
    """Returns the square regions of an image, row by row, and the places of each, row by row.

    Args:
        x: [..., H, W, C], H and W multiples of `regions`.
        regions: R, along each side.

    Returns:
        [..., R * R, (H / R) * (W / R), C].

    Raises:
        ValueError: `regions` does not divide a side.

    Example:
        >>> jax.jit(lambda x: region_partition(x.reshape(4, 4, 1), 2)[0, :, 0])(jnp.arange(16)).tolist()
        [0, 1, 4, 5]

    Source:
        Code DearCaat/RRT-MIL, `region_partition` (there by the size of a region).
    """
    at_least_one(regions=regions)
    if x.ndim < 3 or x.shape[-3] % regions or x.shape[-2] % regions:
        raise ValueError(f"x must be [..., H, W, C] with sides that regions={regions} divides, got {x.shape}")
    lead, (h, w, c) = x.shape[:-3], x.shape[-3:]
    blocks = x.reshape(*lead, regions, h // regions, regions, w // regions, c)
    return jnp.swapaxes(blocks, -4, -3).reshape(*lead, regions * regions, -1, c)


def region_reverse(x: Array, height: int, width: int) -> Array:
    """Returns the image whose `region_partition` is `x`.

    Args:
        x: [..., R * R, P, C].
        height: H.
        width: W, with H W = R^2 P.

    Returns:
        [..., H, W, C].

    Raises:
        ValueError: the sizes do not fit.

    Example:
        >>> back = jax.jit(lambda x: region_reverse(region_partition(x.reshape(4, 4, 1), 2), 4, 4)[0, :, 0])
        >>> back(jnp.arange(16)).tolist()
        [0, 1, 2, 3]

    Source:
        Code DearCaat/RRT-MIL, `region_reverse`.
    """
    regions = math.isqrt(x.shape[-3]) if x.ndim >= 3 else 0
    fits = regions and regions**2 == x.shape[-3] and not height % regions and not width % regions
    if not fits or x.shape[-3] * x.shape[-2] != height * width:
        raise ValueError(f"x must be [..., R * R, P, C] of {height} x {width} places, got {x.shape}")
    lead, c = x.shape[:-3], x.shape[-1]
    blocks = x.reshape(*lead, regions, regions, height // regions, width // regions, c)
    return jnp.swapaxes(blocks, -4, -3).reshape(*lead, height, width, c)


class _Places:
    """Where each instance stands: in which region of its bag's square, and at which place of the region.

    Shapes are those of the longest bag; a shorter one has a smaller square, whose places are the first of each region.
    """

    def __init__(self, bags: Bags, length: int, regions: int):
        longest = math.isqrt(max(length - 1, 0)) + 1
        self.shape = (bags.size, regions * regions, ((longest + -longest % regions) // regions) ** 2)
        # Least root of at least n, corrected for the rounding of the float square root.
        count = jnp.minimum(bags.count, length)
        root = jnp.floor(jnp.sqrt(count.astype(jnp.float32))).astype(jnp.int32)
        root = root - (root * root > count)
        root = jnp.maximum(root + (root * root < count), 1)
        region_side = (root + -root % regions) // regions
        place = bags.rank(jnp.zeros(bags.keep.shape, jnp.float32))
        inner = jnp.broadcast_to(bags.spread(region_side), place.shape)
        row, column = place // (inner * regions), place % (inner * regions)
        region = row // inner * regions + column // inner
        inside = row % inner * inner + column % inner
        bag = jnp.arange(bags.size)[:, None] if bags.segment_ids is None else bags.segment_ids
        flat = (bag * self.shape[1] + region) * self.shape[2] + inside
        self._known = bags.keep & (place < length)
        self._index = jnp.where(self._known, flat, math.prod(self.shape)).reshape(-1)
        self.there = jnp.zeros(math.prod(self.shape), bool).at[self._index].set(True, mode="drop").reshape(self.shape)
        exists = jnp.arange(self.shape[2])[None, None, :] < jnp.square(region_side)[:, None, None]
        self.exists = jnp.broadcast_to(exists, self.shape)

    def fill(self, x: Array) -> Array:
        """Returns [B, R * R, P, D] with 0 in empty places."""
        flat = jnp.zeros((math.prod(self.shape), x.shape[-1]), x.dtype)
        return flat.at[self._index].set(x.reshape(-1, x.shape[-1]), mode="drop").reshape(*self.shape, -1)

    def take(self, y: Array, shape: tuple[int, ...]) -> Array:
        """Returns what stands at each instance's place, in the layout of the instances."""
        flat = y.reshape(-1, y.shape[-1])
        return flat.at[self._index].get(mode="fill", fill_value=0).reshape(shape)

    def inside(self, shape: tuple[int, ...]) -> Array:
        """Returns which instances have a place."""
        return self._known.reshape(shape[:-1])


def _self_attention(params: dict, x: Array, there: Array, heads: int) -> Array:
    """Multi-head attention over the places [..., P, D], with the convolution along the queries if there is one."""
    size, wide = x.shape[-1], compute_dtype(x)
    qkv = xavier_dense(3 * size).apply(params["qkv"], x).reshape(*x.shape[:-1], 3, heads, size // heads)
    q, k, v = (jnp.moveaxis(qkv[..., i, :, :], -2, -3).astype(wide) for i in range(3))  # [..., heads, P, d]
    logits = jnp.matmul(q * (size // heads) ** -0.5, jnp.swapaxes(k, -1, -2))
    # Empty queries must not reach others through the convolution.
    logits = jnp.where(there[..., None, :, None] & there[..., None, None, :], logits, 0.0)
    if "conv" in params:
        kernel, half = params["conv"]["w"].astype(wide), params["conv"]["w"].shape[1] // 2
        padded = jnp.pad(logits, [(0, 0)] * (logits.ndim - 2) + [(half, half), (0, 0)])
        shape = (1,) * (logits.ndim - 3) + (heads, 1, 1)
        moved = params["conv"]["b"].astype(wide).reshape(shape)
        for tap in range(kernel.shape[1]):
            rows = jax.lax.slice_in_dim(padded, tap, tap + logits.shape[-2], axis=-2)
            moved = moved + kernel[:, tap].reshape(shape) * rows
        logits = logits + moved
    weights = masked_softmax(logits, there[..., None, None, :])
    mixed = jnp.moveaxis(jnp.matmul(weights, v), -3, -2).reshape(x.shape).astype(x.dtype)
    return xavier_dense(size).apply(params["out"], mixed)


def _across_regions(params: dict, x: Array, there: Array, heads: int) -> Array:
    """Cross-region attention on [B, R * R, P, D]; a region without a place is not attended to."""
    wide = compute_dtype(x)
    logits = jnp.einsum("brpd,dk->brkp", x.astype(wide), params["phi"].astype(wide))
    filled = jnp.broadcast_to(there[:, :, None, :], logits.shape)
    some = jnp.any(filled, axis=-1, keepdims=True)
    low = jnp.where(some, jnp.min(jnp.where(filled, logits, jnp.inf), axis=-1, keepdims=True), 0.0)
    high = jnp.where(some, jnp.max(jnp.where(filled, logits, -jnp.inf), axis=-1, keepdims=True), 0.0)
    level = jnp.where(filled, (logits - low) / (high - low + 1e-8), 0.0)
    share = jax.nn.softmax(logits, axis=2) * level
    representatives = jnp.einsum("brkp,brpd->bkrd", masked_softmax(logits, filled), x.astype(wide)).astype(x.dtype)
    alive = jnp.broadcast_to(jnp.any(there, axis=-1)[:, None, :], representatives.shape[:3])
    mixed = _self_attention(params, representatives, alive, heads)
    return jnp.einsum("bkrd,brkp->brpd", mixed.astype(wide), share).astype(x.dtype)
