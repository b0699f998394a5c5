"""Learning by Sorting: Self-supervised Learning with Group Ordering Constraints (GroCo, 2023, arXiv 2301.02009).

Sort an anchor's similarities to its positives and to its k hardest negatives with a differentiable sorting network, and
penalise the probability that a positive lands on a negative's rank or the other way round.

    s     = [the k largest cos(z, sg(negatives)), ascending; cos(z, sg(positives)), ascending],  n = k + n_pos
    P     = permutation matrix of the odd-even network with Cauchy comparisons (`ops.odd_even_sort`)
    q_i   = sum of P[i, r] over the ranks r that belong to the group of entry i
    loss  = mean over anchors of (1 / n) sum_i -log q_i

sg stops the gradient: only the anchor learns. Since the rows of P sum to 1, the official mean of two binary cross
entropies (of the positive and of the negative ranks) is this one sum. Because both groups are sorted beforehand, the
network exchanges only across groups. Negatives are the SAME view of other images, on all devices.

Reconstructed: masks and missing negatives (the code assumes a full batch larger than k). The logarithm is cut at the
smallest normal number (-87 in float32) where the code cuts at -100.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import axis_index, gather_rows
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.sorting import odd_even_sort


def groco_loss(
    anchor: Array,
    positives: Array,
    negatives: Array,
    *,
    where: Array | None = None,
    kv_where: Array | None = None,
    k: int = 10,
    steepness: float = 1.0,
    stop_gradient: bool = True,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far the similarities to positives and to the hardest negatives are from being ordered group by group.

    `mean_b (1 / n) sum_i -log sum_{r in group(i)} P_b[i, r]`, P the soft permutation of the n = k + P similarities.

    Args:
        anchor: float [B, D]; embeddings need not be normalised.
        positives: float [B, P, D], of each anchor.
        negatives: float [M, D], shared by all anchors of this shard (gather them yourself).
        where: bool [B], real anchors (their positives with them).
        kv_where: bool [M] or [B, M], which negatives exist, or exist for which anchor.
        k: number of hardest negatives. An anchor with fewer gets exactly the loss of that smaller network (shapes stay
            fixed: empty slots take no part in the sort, its number of layers or the mean).
        steepness: of the comparisons.
        stop_gradient: whether positives and negatives are constants.
        axis_name: mapped axis over which the anchors are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `anchor`. An anchor
        without negatives is no term; no term gives 0.

    Raises:
        ValueError: shapes do not fit, or `k`, `steepness` or `reduction` is out of range.

    Example:
        >>> z = jnp.eye(3)
        >>> loss = jax.jit(lambda positives, negatives: groco_loss(z, positives, negatives, k=2))
        >>> bool(loss(z[:, None], -z) < loss(-z[:, None], z))
        True

    Source:
        Shvetsova et al., arXiv 2301.02009, section 3; code ninatu/learning_by_sorting (k = 10, steepness = 1).
    """
    if anchor.ndim != 2 or positives.ndim != 3 or negatives.ndim != 2:
        raise ValueError(
            "anchor, positives and negatives must be [B, D], [B, P, D] and [M, D], "
            f"got {anchor.shape}, {positives.shape} and {negatives.shape}"
        )
    if positives.shape[::2] != anchor.shape or positives.shape[1] < 1 or negatives.shape[1] != anchor.shape[1]:
        raise ValueError(
            f"positives {positives.shape} and negatives {negatives.shape} do not fit anchor {anchor.shape}: expected "
            "[B, P >= 1, D] and [M, D]"
        )
    rows, count = anchor.shape[0], negatives.shape[0]
    if where is not None and where.shape != (rows,):
        raise ValueError(f"where has shape {where.shape}, expected ({rows},)")
    if kv_where is not None and kv_where.shape not in ((count,), (rows, count)):
        raise ValueError(f"kv_where has shape {kv_where.shape}, expected ({count},) or ({rows}, {count})")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    keep = jnp.ones(rows, bool) if where is None else where
    exist = jnp.ones(count, bool) if kv_where is None else kv_where
    exist = jnp.broadcast_to(exist if exist.ndim == 2 else exist[None, :], (rows, count))
    if stop_gradient:
        positives, negatives = jax.lax.stop_gradient((positives, negatives))
    full = kv_where is None
    terms, some = rows_mixed(_terms)(anchor, positives, negatives, keep, exist, k=k, steepness=steepness, full=full)
    return reduce_terms(terms, keep & some, reduction=reduction, axis_name=axis_name, dtype=anchor.dtype)


def groco_multiview_loss(
    views: Array,
    *,
    where: Array | None = None,
    num_positive_views: int | None = None,
    k: int = 10,
    steepness: float = 1.0,
    stop_gradient: bool = True,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns `groco_loss` of every view against the other views of its image and the same view of other images.

    `mean_v mean_i groco(z_vi, {z_wi : w != v}, {z_vj : j != i})`.

    Args:
        views: float [V, B, D], V >= 2 views of B images.
        where: bool [B], real images.
        num_positive_views: the first so many views (full crops) are positives; the others (small crops) are anchors
            only. None = all V; with 1 the first view has no positive and is no term.
        k: number of hardest negatives; with fewer other images, all of them (see `groco_loss`).
        steepness: of the comparisons.
        stop_gradient: whether each view is a constant where it is not the anchor.
        axis_name: mapped axis over which the images are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[V, B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[V, B]` in the dtype of `views`; 0 with fewer
        than two images.

    Raises:
        ValueError: `views` is not [V >= 2, B, D], or an option is out of range.

    Example:
        >>> loss = jax.jit(lambda views: groco_multiview_loss(views, k=2))
        >>> z = jnp.eye(4)
        >>> bool(loss(jnp.stack([z, z])) < loss(jnp.stack([z, -z])))
        True

    Source:
        Shvetsova et al., arXiv 2301.02009, sections 3 and 4; code ninatu/learning_by_sorting.
    """
    if views.ndim != 3 or views.shape[0] < 2:
        raise ValueError(f"views must be [V, B, D] with V >= 2 views, got {views.shape}")
    num_views, rows, _ = views.shape
    full = num_views if num_positive_views is None else num_positive_views
    if not 1 <= full <= num_views:
        raise ValueError(f"num_positive_views={num_positive_views} must be between 1 and the {num_views} views")
    if where is not None and where.shape != (rows,):
        raise ValueError(f"where has shape {where.shape}, expected ({rows},)")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    keep = jnp.ones(rows, bool) if where is None else where
    terms, some = rows_mixed(_multiview_terms)(
        views,
        keep,
        positive_views=full,
        k=k,
        steepness=steepness,
        stop=stop_gradient,
        masked=where is not None,
        axis_name=axis_name,
    )
    return reduce_terms(terms, keep[None, :] & some, reduction=reduction, axis_name=axis_name, dtype=views.dtype)


def _multiview_terms(views, keep, *, positive_views, k, steepness, stop, masked, axis_name):
    num_views, rows, _ = views.shape
    by_image = jnp.moveaxis(views, 1, 0)
    everyone = jnp.moveaxis(gather_rows(jax.lax.stop_gradient(by_image) if stop else by_image, axis_name), 0, 1)
    total = everyone.shape[1]
    own = (axis_index(axis_name) * rows + jnp.arange(rows))[:, None] == jnp.arange(total)[None, :]
    exist = gather_rows(keep, axis_name)[None, :] & jnp.logical_not(own)
    targets = jnp.moveaxis(jax.lax.stop_gradient(by_image) if stop else by_image, 0, 1)
    full = not masked and total > k

    def one(anchor, positives, negatives):
        positives = jnp.moveaxis(positives, 0, 1)
        return _terms(anchor, positives, negatives, keep, exist, k=k, steepness=steepness, full=full)

    # Full crops have one positive fewer than small ones, hence two groups, each one network over all its views.
    crops = [[w for w in range(positive_views) if w != view] for view in range(num_views)]
    results = []
    for group in (range(positive_views), range(positive_views, num_views)):
        if len(group) and crops[group[0]]:
            positives = targets[jnp.array([crops[view] for view in group])]
            group = slice(group[0], group[-1] + 1)
            results.append(jax.vmap(one)(views[group], positives, everyone[group]))
        elif len(group):  # the only full crop has no positive, so it is no term
            results.append((jnp.zeros((1, rows), compute_dtype(views)), jnp.zeros((1, rows), bool)))
    return tuple(jnp.concatenate(parts) for parts in zip(*results, strict=True))


def _terms(anchor, positives, negatives, keep, exist, *, k, steepness, full):
    """Returns the loss of each anchor [B] and whether it has a negative; `full`: every one has at least k of M."""
    dtype, count = compute_dtype(anchor, positives, negatives), negatives.shape[0]
    exist = exist & keep[:, None]
    anchor = safe_normalize(zero_where_false(anchor, keep).astype(dtype))
    positives = safe_normalize(zero_where_false(positives, keep).astype(dtype))
    negatives = safe_normalize(zero_where_false(negatives, jnp.any(exist, axis=0)).astype(dtype))
    positive = jnp.einsum("bd,bpd->bp", anchor, positives, precision=jax.lax.Precision.HIGHEST)
    negative = jnp.matmul(anchor, negatives.T, precision=jax.lax.Precision.HIGHEST)
    # Cosines are at least -1, so that empty slots come last among the largest.
    hardest, index = jax.lax.top_k(jnp.where(exist, negative, jnp.full((), -2.0, dtype)), min(k, count))
    filled = jnp.take_along_axis(exist, index, axis=1)
    scores = jnp.concatenate([hardest[:, ::-1], jnp.sort(positive, axis=1)], axis=1)
    slots = jnp.concatenate([filled[:, ::-1], jnp.ones(positive.shape, bool)], axis=1)
    _, permutation = odd_even_sort(scores, steepness=steepness, where=None if full else slots)
    # Kept entries stand first in the ranks: the negatives' ranks are those below their number.
    number = jnp.sum(filled, axis=1, keepdims=True)
    rank_is_negative = (jnp.arange(scores.shape[1])[None, :] < number)[:, None, :]
    entry_is_negative = (jnp.arange(scores.shape[1]) < hardest.shape[1])[None, :, None]
    own_group = jnp.sum(jnp.where(rank_is_negative == entry_is_negative, permutation, 0.0), axis=-1)
    tiny = jnp.finfo(dtype).tiny
    safe = jnp.where(slots & (own_group > tiny), own_group, jnp.where(slots, tiny, 1.0))
    loss = -jnp.log(jnp.where(safe < 1, safe, 1.0))
    used = number + positive.shape[1]
    return jnp.sum(loss, axis=1) / used[:, 0].astype(dtype), number[:, 0] > 0
