"""Arithmetic over parameter pytrees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def tree_lerp(a: Any, b: Any, weight: float | Array) -> Any:
    """Returns `(1 - weight) * a + weight * b` leaf by leaf, in the dtypes of `a`.

    Example:
        >>> tree_lerp({"w": jax.numpy.zeros(1)}, {"w": jax.numpy.ones(1)}, 0.25)["w"].tolist()
        [0.25]
    """

    def mix(x, y):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x32, y32 = x.astype(wide), y.astype(wide)
        return (x32 + jnp.asarray(weight, wide) * (y32 - x32)).astype(x.dtype)

    return jax.tree.map(mix, a, b)


def ema_update(average: Any, params: Any, *, decay: float | Array) -> Any:
    """Returns the exponential moving average `decay * average + (1 - decay) * params`, without gradient.

    Args:
        average: pytree of floating arrays.
        params: pytree of the same structure.
        decay: float or scalar array in [0, 1].

    Example:
        >>> ema_update({"w": jax.numpy.ones(1)}, {"w": jax.numpy.zeros(1)}, decay=0.75)["w"].tolist()
        [0.75]
    """
    return tree_lerp(average, jax.lax.stop_gradient(params), 1.0 - decay)


def tree_norm(tree: Any) -> Array:
    """Returns the Euclidean norm over all leaves, float32.

    Example:
        >>> float(tree_norm({"a": jax.numpy.array([3.0]), "b": jax.numpy.array([4.0])}))
        5.0
    """
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))
