"""Soft decision trees with any number of leaves, whose splits become exactly 0 or 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.ops.masked import compute_dtype


def smooth_step(u: Array, *, width: float = 1.0) -> Array:
    """Returns the cubic that rises from exactly 0 at `-width / 2` to exactly 1 at `width / 2`.

    `S(u) = 1/2 + 3/2 v - 2 v^3` with `v = u / width`, 0 below v = -1/2 and 1 above v = 1/2; its derivative is
    continuous, and 0 outside the band.

    Args:
        u: float, any shape.
        width: > 0, of the band in which S lies strictly between 0 and 1 (the papers' gamma).

    Returns:
        Shape and dtype of `u`, in [0, 1].

    Raises:
        ValueError: `width` is not positive.

    Example:
        >>> smooth_step(jnp.array([-0.5, 0.0, 0.25, 3.0])).tolist()
        [0.0, 0.5, 0.84375, 1.0]

    Source:
        Hazimeh et al., The Tree Ensemble Layer, arXiv 2002.07772, eq. 5.
    """
    if not width > 0:
        raise ValueError(f"width={width} must be positive")
    v = jnp.clip(u.astype(compute_dtype(u)) / width, -0.5, 0.5)
    return (0.5 + v * (1.5 - 2 * v * v)).astype(u.dtype)


def soft_tree_tables(num_leaves: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each leaf, from left to right, the inner nodes above it and the side on which it hangs.

    Nodes are numbered as in a heap: L - 1 inner nodes 0 .. L - 2, node i with the children 2 i + 1 (left) and 2 i + 2,
    leaves L - 1 .. 2 L - 2. Where L is no power of 2, leaves of two neighbouring depths exist, and their order from
    left to right is not that of their numbers.

    Args:
        num_leaves: L >= 1.

    Returns:
        `ancestors` int [L, depth], root first, padded with -1; `left` bool [L, depth], True where the way to the leaf
        goes left; `nodes` int [L], the leaves' numbers in the heap.

    Raises:
        ValueError: `num_leaves` is less than 1.

    Example:
        >>> ancestors, left, nodes = soft_tree_tables(3)
        >>> ancestors.tolist(), left.tolist(), nodes.tolist()
        ([[0, 1], [0, 1], [0, -1]], [[True, True], [True, False], [False, False]], [3, 4, 2])
    """
    if num_leaves < 1:
        raise ValueError(f"num_leaves={num_leaves} must be at least 1")
    ways: list[list[tuple[int, bool]]] = []
    nodes: list[int] = []

    def descend(node: int, way: list[tuple[int, bool]]) -> None:
        if node >= num_leaves - 1:
            ways.append(way)
            nodes.append(node)
            return
        descend(2 * node + 1, [*way, (node, True)])
        descend(2 * node + 2, [*way, (node, False)])

    descend(0, [])
    depth = max(len(way) for way in ways)
    ancestors, left = np.full((num_leaves, depth), -1), np.zeros((num_leaves, depth), bool)
    for leaf, way in enumerate(ways):
        for level, (node, goes_left) in enumerate(way):
            ancestors[leaf, level], left[leaf, level] = node, goes_left
    return ancestors, left, np.array(nodes)


def soft_tree_leaves(splits: Array) -> Array:
    """Returns the probability of each leaf of a soft decision tree.

    `P(leaf) = product over the inner nodes i above it of splits[i] (way left) or 1 - splits[i] (way right)`.

    Args:
        splits: float [..., L - 1], at each inner node (see `soft_tree_tables`) the probability of going left.

    Returns:
        float [..., L], from left to right, in the dtype of `splits`; sums to 1.

    Raises:
        ValueError: `splits` is a scalar.

    Example:
        >>> soft_tree_leaves(jnp.array([0.5, 1.0])).tolist()
        [0.5, 0.0, 0.5]

    Source:
        Hazimeh et al., The Tree Ensemble Layer, arXiv 2002.07772; leaves of two depths as in COMET, arXiv 2306.02824.
    """
    if splits.ndim < 1:
        raise ValueError(f"splits must have at least one axis, got shape {splits.shape}")
    num_leaves = splits.shape[-1] + 1
    ancestors, left, _ = soft_tree_tables(num_leaves)
    wide = splits.astype(compute_dtype(splits))
    # One more "split" that is always 1 stands under the padding -1, so that short ways are multiplied by 1.
    ones = jnp.ones_like(wide[..., :1]) if num_leaves > 1 else jnp.ones((*splits.shape[:-1], 1), wide.dtype)
    wide = jnp.concatenate([wide, ones], axis=-1)
    leaves = jnp.broadcast_to(ones, (*splits.shape[:-1], num_leaves))
    # Factor by factor: unlike a sum of logarithms, product and gradient are exact where a split is 0.
    for level in range(ancestors.shape[1]):
        split = jnp.take(wide, jnp.asarray(ancestors[:, level] % num_leaves), axis=-1)
        goes_right = (ancestors[:, level] >= 0) & ~left[:, level]
        right = jnp.asarray(goes_right).reshape((1,) * (splits.ndim - 1) + (num_leaves,))
        leaves = leaves * jnp.where(right, 1 - split, split)
    return jax.lax.convert_element_type(leaves, splits.dtype)
