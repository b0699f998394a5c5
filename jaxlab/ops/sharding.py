"""One helper for functions that mix rows, so that they accept arrays on a mesh with Explicit axes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def rows_mixed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the compiler choose the shardings inside `function`, whose result is then replicated.

    Products of all pairs of rows, sorts and segment sums have no unambiguous sharding rule, so arrays on a mesh with
    Explicit axes would be refused. Without such a mesh `function` is called as it is.

    Args:
        function: arrays in, arrays out; static arguments as keywords.

    Example:
        >>> import jax.numpy as jnp
        >>> rows_mixed(lambda x: x @ x.T)(jnp.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    @functools.wraps(function)
    def run(*args, **keywords):
        mesh = jax.sharding.get_abstract_mesh()
        leaves = jax.tree.leaves((args, keywords))
        meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves if isinstance(leaf, jax.Array)]
        explicit = [m for m in (mesh, *meshes) if not m.empty and AxisType.Explicit in m.axis_types]
        if not explicit:
            return function(*args, **keywords)
        traced = {name: value for name, value in keywords.items() if isinstance(value, jax.Array)}
        static = {name: value for name, value in keywords.items() if name not in traced}

        def inner(args, traced):
            return function(*args, **traced, **static)

        with jax.sharding.use_abstract_mesh(explicit[0]):
            return jax.sharding.auto_axes(inner, out_sharding=PartitionSpec())(args, traced)

    return run
