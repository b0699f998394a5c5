"""Bags of instances in two layouts, and the poolings that turn a bag into one vector.

Padded: `x [B, N, D]` with `where [B, N]`. Ragged: `x [T, D]` with `segment_ids [T]` (the bag of each instance, in any
order, -1 = padding) and `num_segments` = B. Every model of the family takes either one and gives the same numbers:

    sum, mean, max, softmax over the instances of each bag;   an empty bag gives 0 (and softmax weights of nothing)

Both layouts are written out in `Bags` and nowhere else. Attention over a list is `kernels.attention_pool`, which makes
no weighted copy of the values: memory is that of the list.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab import kernels
from jaxlab.ops.masked import compute_dtype, masked_softmax, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def attention_pool(
    values: Array,
    scores: Array,
    *,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
) -> Array:
    """Returns the average of each bag's instances under the softmax of their scores.

    `z_b = sum_i a_i v_i`, `a = softmax of the scores over the instances of bag b`.

    Args:
        values: float [B, N, D], or [T, D] with `segment_ids`.
        scores: float [B, N] (or [T]); with a further axis of K heads the bags have K pooled vectors.
        where: bool [B, N] (or [T]), real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        [B, D], or [B, K, D] with heads, in the dtype of `values`; an empty bag is 0.

    Raises:
        ValueError: shapes do not fit, or `segment_ids` comes without `num_segments`.

    Example:
        >>> attention_pool(jnp.array([[[1.0], [3.0]]]), jnp.zeros((1, 2))).tolist()
        [[2.0]]

    Source:
        Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, eq. 7.
    """
    bags = group(values, where, segment_ids, num_segments)
    if scores.shape[: bags.keep.ndim] != bags.keep.shape or scores.ndim > bags.keep.ndim + 1:
        raise ValueError(f"scores has shape {scores.shape}, expected {bags.keep.shape} or that with an axis of heads")
    return rows_mixed(lambda v, s, bags: bags.attend(v, s))(values, scores, bags)


def mean_pool(
    x: Array, *, where: Array | None = None, segment_ids: Array | None = None, num_segments: int | None = None
) -> Array:
    """Returns the mean of each bag's instances.

    Args:
        x: float [B, N, D], or [T, D] with `segment_ids`.
        where: bool [B, N] (or [T]), real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        [B, D] in the dtype of `x`; an empty bag is 0.

    Raises:
        ValueError: shapes do not fit, or `segment_ids` comes without `num_segments`.

    Example:
        >>> mean_pool(jnp.array([[1.0], [3.0], [5.0]]), segment_ids=jnp.array([0, 0, 1]), num_segments=2).tolist()
        [[2.0], [5.0]]
    """
    bags = group(x, where, segment_ids, num_segments)
    return rows_mixed(lambda x, bags: bags.mean(x).astype(x.dtype))(x, bags)


def max_pool(
    x: Array, *, where: Array | None = None, segment_ids: Array | None = None, num_segments: int | None = None
) -> Array:
    """Returns the largest value of each feature in each bag; ties share the gradient.

    Args:
        x: float [B, N, D], or [T, D] with `segment_ids`.
        where: bool [B, N] (or [T]), real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        [B, D] in the dtype of `x`; an empty bag is 0.

    Raises:
        ValueError: shapes do not fit, or `segment_ids` comes without `num_segments`.

    Example:
        >>> max_pool(jnp.array([[[1.0, 5.0], [3.0, 2.0]]])).tolist()
        [[3.0, 5.0]]
    """
    bags = group(x, where, segment_ids, num_segments)
    return rows_mixed(lambda x, bags: bags.max(x))(x, bags)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bags:
    """Which instance belongs to which bag; the methods take arrays whose leading axes are those of the instances.

    Attributes:
        keep: bool [B, N] (padded) or [T] (ragged), real instances.
        segment_ids: int32 [T] with B where an instance is padding; None in the padded layout.
        size: B.
    """

    keep: Array
    segment_ids: Array | None
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> Array:
        """int32 [B], instances of each bag."""
        return self._total(self.keep.astype(jnp.int32))

    def sum(self, x: Array) -> Array:
        """Returns [B, ...], the sum over each bag, in the dtype of accumulation."""
        return self._total(zero_where_false(x, self.keep).astype(compute_dtype(x)))

    def mean(self, x: Array) -> Array:
        """Returns [B, ...], the mean over each bag, in the dtype of accumulation."""
        total = self.sum(x)
        return safe_divide(total, jnp.broadcast_to(_expand(self.count, total.ndim).astype(total.dtype), total.shape))

    def max(self, x: Array) -> Array:
        """Returns [B, ...], the maximum over each bag, 0 for an empty one."""
        low = jnp.where(_expand(self.keep, x.ndim), x, jnp.full((), -jnp.inf, x.dtype))
        if self.segment_ids is None:
            top = jnp.max(low, axis=1)
        else:
            top = jax.ops.segment_max(low, self.segment_ids, self.size + 1)[:-1]
        return jnp.where(_expand(self.count > 0, top.ndim), top, jnp.zeros((), x.dtype))

    def softmax(self, scores: Array) -> Array:
        """Returns the weights, shaped like `scores`, that sum to 1 over each bag; 0 on padding."""
        keep = _expand(self.keep, scores.ndim)
        if self.segment_ids is None:
            return masked_softmax(scores, keep, axis=1)
        wide = jnp.where(keep, scores, jnp.zeros((), scores.dtype)).astype(compute_dtype(scores))
        shifted = wide - self.spread(jax.lax.stop_gradient(self.max(wide)))
        exponential = jnp.where(keep, jnp.exp(jnp.where(keep, shifted, 0.0)), 0.0)
        return safe_divide(exponential, self.spread(self.sum(exponential))).astype(scores.dtype)

    def attend(self, values: Array, scores: Array) -> Array:
        """Returns [B, D] (or [B, K, D] for scores of K heads), each bag's average under the softmax of the scores."""
        return self.pool(values, scores)[0]

    def pool(self, values: Array, scores: Array) -> tuple[Array, Array]:
        """Returns each bag's average under the softmax of the scores, and this softmax, both in the dtype of `values`.

        [B, D] and weights like `scores`; for scores with an axis of K heads [B, K, D].
        """
        scores = scores.astype(compute_dtype(values, scores))
        if self.segment_ids is None:
            weights = self.softmax(scores)
            pooled = self.weigh(values, weights).astype(values.dtype)
        else:
            pooled, weights = kernels.attention_pool(values, scores, self.segment_ids, self.size, return_weights=True)
        return pooled, weights.astype(values.dtype)

    def weigh(self, values: Array, weights: Array) -> Array:
        """Returns [B, D] (or [B, K, D]), the sum over each bag of weight times value, in the dtype of accumulation."""
        heads = weights.ndim > self.keep.ndim
        weights = weights if heads else weights[..., None]
        values = zero_where_false(values, self.keep).astype(compute_dtype(values))
        weights = zero_where_false(weights, self.keep).astype(values.dtype)
        if self.segment_ids is None:
            total = jnp.einsum("bnk,bnd->bkd", weights, values)
        else:
            total = self._total(weights[:, :, None] * values[:, None, :])
        return total if heads else total[:, 0]

    def spread(self, y: Array) -> Array:
        """Gives every instance what its bag has: [B, ...] to [B, 1, ...] (which broadcasts) or [T, ...]."""
        if self.segment_ids is None:
            return y[:, None]
        return y[jnp.minimum(self.segment_ids, self.size - 1)]

    def rank(self, scores: Array) -> Array:
        """Returns int32 like `keep`: place of each instance in its bag by falling score, ties by position."""
        falling = jnp.where(self.keep, -scores.astype(compute_dtype(scores)), jnp.inf)
        if self.segment_ids is None:
            return jnp.argsort(jnp.argsort(falling, axis=1, stable=True), axis=1).astype(jnp.int32)
        order = jnp.lexsort((falling, self.segment_ids))
        place = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(self.count)[:-1].astype(jnp.int32)])
        return place - self.spread(starts)

    def only(self, mask: Array) -> Bags:
        """Returns the same bags with the instances outside `mask` as padding."""
        keep = self.keep & mask
        ids = None if self.segment_ids is None else jnp.where(keep, self.segment_ids, self.size)
        return Bags(keep, ids, self.size)

    def uniform(self, key: Array) -> Array:
        """Returns float32 like `keep`, drawn from [0, 1); padding at the end of a bag leaves the others as they are."""
        if self.segment_ids is not None:
            return jax.random.uniform(key, self.keep.shape)
        keys = jax.random.split(key, self.size)
        return jax.vmap(lambda k: jax.random.uniform(k, self.keep.shape[1:]))(keys)

    def _total(self, x: Array) -> Array:
        if self.segment_ids is None:
            return jnp.sum(x, axis=1)
        return jax.ops.segment_sum(x, self.segment_ids, self.size + 1)[:-1]


def group(x: Array, where: Array | None, segment_ids: Array | None, num_segments: int | None) -> Bags:
    """Returns the `Bags` of instances `x`, after checking that the arguments fit each other.

    Raises:
        ValueError: they do not.
    """
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError(f"num_segments={num_segments} is given without segment_ids")
        if x.ndim != 3:
            raise ValueError(f"x must be [B, N, D], or [T, D] with segment_ids, got shape {x.shape}")
        if where is not None and where.shape != x.shape[:2]:
            raise ValueError(f"where has shape {where.shape}, expected {x.shape[:2]}")
        return Bags(jnp.ones(x.shape[:2], bool) if where is None else jnp.asarray(where), None, x.shape[0])
    if x.ndim != 2 or segment_ids.shape != x.shape[:1]:
        raise ValueError(f"with segment_ids x must be [T, D] and segment_ids [T], got {x.shape}, {segment_ids.shape}")
    if num_segments is None or num_segments < 1:
        raise ValueError(f"num_segments={num_segments} must be at least 1, the number of bags in segment_ids")
    if where is not None and where.shape != x.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:1]}")
    ids = jnp.asarray(segment_ids, jnp.int32)
    keep = (ids >= 0) & (ids < num_segments)
    keep = keep if where is None else keep & where
    return Bags(keep, jnp.where(keep, ids, num_segments), num_segments)


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))
