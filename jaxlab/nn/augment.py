"""Augmentation as part of a network, so that every peer draws its own."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.types import Layer, StatefulLayer, as_stateful


def random_shift(key: Array, x: Array, *, pixels: int = 1) -> Array:
    """Returns the images shifted by up to `pixels` in each direction, zeros moving in, one draw per image.

    Args:
        key: typed PRNG key.
        x: [N, H, W, C].
        pixels: largest shift.

    Example:
        >>> random_shift(jax.random.key(0), jnp.ones((2, 4, 4, 1)), pixels=1).shape
        (2, 4, 4, 1)
    """
    n, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    starts = jax.random.randint(key, (n, 2), 0, 2 * pixels + 1)

    def crop(image, start):
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (h, w, c))

    return jax.vmap(crop)(padded, starts)


def random_affine(key: Array, x: Array, *, degrees: float = 10.0, scale: float = 0.1, pixels: float = 1.0) -> Array:
    """Returns the images rotated, scaled and shifted at random, bilinear, zeros moving in, one draw per image.

    Args:
        key: typed PRNG key.
        x: [N, H, W, C].
        degrees: largest rotation to either side.
        scale: largest relative change of size.
        pixels: largest shift in each direction.

    Example:
        >>> random_affine(jax.random.key(0), jnp.ones((2, 4, 4, 1))).shape
        (2, 4, 4, 1)
    """
    n, h, w, _ = x.shape
    draws = jax.random.uniform(key, (n, 4), minval=-1.0, maxval=1.0)
    rows, cols = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing="ij")

    def move(image, draw):
        angle, size = draw[0] * degrees * jnp.pi / 180, 1 + draw[1] * scale
        cos, sin = jnp.cos(angle) / size, jnp.sin(angle) / size
        at = [cos * rows - sin * cols + (h - 1) / 2, sin * rows + cos * cols + (w - 1) / 2]
        at = [a + pixels * d for a, d in zip(at, draw[2:], strict=True)]
        sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1, mode="constant")
        return jax.vmap(sample, in_axes=2, out_axes=2)(image)

    return jax.vmap(move)(x, draws).astype(x.dtype)


def with_augmentation(net: Layer | StatefulLayer, augment: Callable[[Array, Array], Array]) -> StatefulLayer:
    """Returns the network with `augment(key, x)` before it in training; evaluation is untouched.

    Args:
        net: any network.
        augment: `x = augment(key, x)`.
    """
    net = as_stateful(net)

    def apply(params, state, x, *, key=None, train=False):
        if train:
            if key is None:
                raise ValueError("key is needed: this network augments its input in training")
            key, key_augment = jax.random.split(key)
            x = augment(key_augment, x)
        return net.apply(params, state, x, key=key, train=train)

    return StatefulLayer(net.init, apply)
