"""Collectives that are the identity without an axis name, and the gradient contract of functions that use them.

A loss with `axis_name` returns the GLOBAL value, equal on every device. Outside the mapped function `jax.grad` of it is
right in every mode. A learner that differentiates INSIDE the mapped function goes through `value_and_grad` here, which
knows what the modes of `shard_map`, `pmap` and `vmap` do to cotangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab._compat import make_varying, varying_axes
from jaxlab.ops.masked import masked_sum, safe_divide


def axis_size(axis_name: str | None) -> int:
    """Returns the number of shards along `axis_name`, 1 without a name."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def axis_index(axis_name: str | None) -> Array | int:
    """Returns this shard's position along `axis_name`, 0 without a name."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def all_sum(x: Any, axis_name: str | None) -> Any:
    """Returns the sum over the shards, and `x` itself without an axis name."""
    return x if axis_name is None else jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis_name), x)


def all_mean(x: Any, axis_name: str | None) -> Any:
    """Returns the mean over the shards, and `x` itself without an axis name."""
    return x if axis_name is None else jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name), x)


def gather_rows(x: Array, axis_name: str | None) -> Array:
    """Returns the rows of all shards in order, `[axis size * N, ...]`, and `x` itself without an axis name."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def global_mean(terms: Array, where: Array | None = None, *, axis_name: str | None = None) -> Array:
    """Returns the mean of the kept terms of all shards; no term at all gives 0 with zero gradient.

    Args:
        terms: [...], the terms of this shard.
        where: bool, shape of `terms`; None keeps everything.
        axis_name: mesh axis over which the terms are spread.

    Example:
        >>> import jax.numpy as jnp
        >>> float(global_mean(jnp.array([1.0, 3.0])))
        2.0
    """
    keep = jnp.ones(terms.shape, bool) if where is None else where
    total = masked_sum(terms, keep)
    count = jnp.sum(keep, dtype=total.dtype)
    return safe_divide(all_sum(total, axis_name), all_sum(count, axis_name))


def match_varying(*arrays: Any) -> Any:
    """Returns the arrays marked as varying over the union of the mesh axes over which any of them varies.

    Inside `shard_map` with `check_vma=True` a `custom_vjp` or a loop must not mix arrays that vary over different axes;
    the transpose of this marking is the sum that a replicated input's gradient needs.

    Args:
        *arrays: pytrees of arrays.

    Returns:
        A tuple of the pytrees, or the single one.
    """
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(arrays)), frozenset())
    marked = jax.tree.map(lambda leaf: make_varying(leaf, axes), arrays) if axes else arrays
    return marked[0] if len(arrays) == 1 else marked


def value_and_grad(
    loss: Callable[..., Any], *, axis_name: str | None = None, has_aux: bool = False, sharded: Any = None
) -> Callable[..., Any]:
    """Returns `value_and_grad` of a global loss, right inside `vmap`, `pmap` and `shard_map` (`check_vma` on or off).

    With g_i the derivative of the global loss by the copy of the parameters on shard i, the gradient is `sum_i g_i` for
    replicated parameters and `g_i` for parameters that are sharded over the axis. What automatic differentiation gives
    inside the map depends on its mode, by factors of the axis size, because the transpose of `psum` does; so every
    parameter is first marked as this shard's own copy, and the cotangent of the loss is divided among the shards
    exactly where the mode would count it once on each.

    Args:
        loss: `loss(params, *args)` that returns the same scalar on every shard (with `has_aux`, a pair).
        axis_name: the mapped axis; None gives `jax.value_and_grad`.
        has_aux: as in `jax.value_and_grad`.
        sharded: pytree prefix of bools, True for leaves that are sharded over the axis (experts); None = none is.

    Returns:
        A function like `loss` that returns `(value, grads)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step = value_and_grad(lambda w, x: all_mean(w * x, "data"), axis_name="data")
        >>> value, grad = jax.vmap(step, in_axes=(None, 0), axis_name="data")(jnp.float32(2), jnp.array([1.0, 3.0]))
        >>> grad.tolist()
        [2.0, 2.0]
    """
    if axis_name is None:
        return jax.value_and_grad(loss, has_aux=has_aux)

    def run(params, *args):
        own = jax.tree.map(lambda leaf: make_varying(leaf, _mode_axes(axis_name)), params)
        size = jax.lax.axis_size(axis_name)

        def averaged(own):
            result = loss(own, *args)
            value = result[0] if has_aux else result
            # A loss that JAX knows to be replicated is one scalar, whose cotangent is counted once. Otherwise every
            # shard seeds its own copy and `psum` transposes to `psum`: the seeds add up to the axis size.
            replicated = _tracked(axis_name) and axis_name not in varying_axes(value)
            scaled = value if replicated else value / size
            return scaled, (value, result[1] if has_aux else None)

        (_, (value, aux)), grads = jax.value_and_grad(averaged, has_aux=True)(own)
        flags = jax.tree.broadcast(False if sharded is None else sharded, grads)
        grads = jax.tree.map(lambda g, own_shard: g if own_shard else jax.lax.psum(g, axis_name), grads, flags)
        return ((value, aux) if has_aux else value), grads

    return run


def _tracked(axis_name: str) -> bool:
    """Tells whether the axis is one whose replication JAX tracks (`shard_map` with `check_vma=True`)."""
    return axis_name in varying_axes(jax.lax.axis_index(axis_name))


def _mode_axes(axis_name: str) -> frozenset[str]:
    return frozenset({axis_name}) if _tracked(axis_name) else frozenset()
