"""Small layers in plain JAX, of which architecture papers are composed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.masked import compute_dtype
from jaxlab.types import Layer


def dense(features: int, *, bias: bool = True, scale: float = 1.0) -> Layer:
    """Returns `y = x w + b` with `w ~ N(0, scale / inputs)`.

    Args:
        features: size of the last axis of the result.
        bias: whether to add `b`, which starts at 0.
        scale: variance of the initial weights times the number of inputs.

    Example:
        >>> layer = dense(3)
        >>> layer.apply(layer.init(jax.random.key(0), 2), jnp.ones((4, 2))).shape
        (4, 3)
    """

    def init(key, size):
        params = {"w": jax.random.normal(key, (size, features)) * (scale / size) ** 0.5}
        return {**params, "b": jnp.zeros(features)} if bias else params

    def apply(params, x):
        y = jnp.matmul(x, params["w"].astype(x.dtype), preferred_element_type=compute_dtype(x))
        if bias:
            y = y + params["b"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (features,))
        return y.astype(x.dtype)

    return Layer(init, apply)


def feature_norm(*, eps: float = 1e-6) -> Layer:
    """Returns layer normalisation over the last axis with gain and bias, statistics in at least float32.

    Example:
        >>> layer = feature_norm()
        >>> float(layer.apply(layer.init(jax.random.key(0), 2), jnp.array([[1.0, 3.0]]))[0, 1].round(3))
        1.0
    """

    def init(key, size):
        del key
        return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}

    def apply(params, x):
        wide = x.astype(compute_dtype(x))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        return (unit * params["gain"].reshape(shape) + params["bias"].reshape(shape)).astype(x.dtype)

    return Layer(init, apply)


def mlp(sizes: Sequence[int], *, activation: Callable[[Array], Array] = jax.nn.relu) -> Layer:
    """Returns dense layers of the given output sizes with the activation between them.

    Example:
        >>> layer = mlp([8, 3])
        >>> layer.apply(layer.init(jax.random.key(0), 2), jnp.ones((4, 2))).shape
        (4, 3)
    """
    sizes = tuple(sizes)
    layers = [dense(size, scale=2.0) for size in sizes]

    def init(key, size):
        keys = jax.random.split(key, len(sizes))
        inputs = (size, *sizes[:-1])
        return {f"dense_{i}": layer.init(keys[i], inputs[i]) for i, layer in enumerate(layers)}

    def apply(params, x):
        for i, layer in enumerate(layers):
            x = layer.apply(params[f"dense_{i}"], activation(x) if i else x)
        return x

    return Layer(init, apply)
