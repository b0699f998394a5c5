"""Transitive Invariance for Self-supervised Visual Representation Learning (2017, arXiv 1708.02901).

Two kinds of edges join images without labels: INTER, two objects that look alike (neighbours under another network's
features), and INTRA, one object seen twice (the ends of a track in a video). If A looks like B, and A' and B' are the
same objects seen otherwise, then A' and B' belong together as well: pairs that neither edge gives.

    pairs = {(u, v): u, v views of one object, or views of two objects with an inter edge}
    D(x, y) = 1 - cos(f(x), f(y)),   loss = mean over pairs of max(0, D(x, x+) - D(x, x-) + margin),   margin 0.5

Reconstructed (the paper's graph was built by programs that were not released): neighbours by the cosine, mutual or not;
masks; the mean over an anchor's pairs before that over anchors. Hard negatives follow the predecessor (Wang, Gupta,
Unsupervised Learning of Visual Representations using Videos, arXiv 1505.00687): the 4 of the batch with the highest
loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.contrastive._pairs import checked_where, unit_rows
from jaxlab.ops.collectives import gather_rows
from jaxlab.ops.masked import masked_mean
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed

KINDS = ("transitive", "both", "inter", "intra")


def batch_hard_triplet_loss(
    embeddings: Array,
    positive: Array,
    negative: Array,
    *,
    margin: float = 0.5,
    top: int | None = 4,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the triplet loss of all positive pairs of a batch against each anchor's hardest negatives.

    `mean_i mean_{p positive} mean_{n of the top hardest} max(0, cos_in - cos_ip + margin)`.

    Args:
        embeddings: float [N, D]; need not be normalised.
        positive: bool [N, M], which rows belong to each anchor; M = N, or the rows of all shards in order.
        negative: bool [N, M], which rows may be pushed away: not those that are related in any way.
        margin: >= 0.
        top: how many of the negatives with the highest loss count; None = all.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread: positives and negatives come from all shards.
        reduction: "mean" over anchors (of all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `embeddings`. An anchor
        without a positive or without a negative is no term; no term gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> z, same = jnp.eye(4)[jnp.array([0, 0, 1, 1])], jnp.array([0, 0, 1, 1])
        >>> same = same[:, None] == same[None, :]
        >>> loss = jax.jit(lambda same: batch_hard_triplet_loss(z, same & ~jnp.eye(4, dtype=bool), ~same))
        >>> float(loss(same)), float(loss(~same))
        (0.0, 1.5)

    Source:
        Wang, He, Gupta, arXiv 1708.02901, section 4 (cosine distance, margin 0.5); hard negatives of arXiv 1505.00687.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got {embeddings.shape}")
    keep = checked_where(where, embeddings.shape[0], 1.0)
    if positive.ndim != 2 or positive.shape[0] != embeddings.shape[0] or negative.shape != positive.shape:
        raise ValueError(
            f"positive and negative must both be [{embeddings.shape[0]}, M], got {positive.shape} and {negative.shape}"
        )
    if axis_name is None and positive.shape[1] != embeddings.shape[0]:
        raise ValueError(f"positive has {positive.shape[1]} columns, expected {embeddings.shape[0]}, one for each row")
    if margin < 0 or (top is not None and top < 1):
        raise ValueError(f"margin={margin} must not be negative and top={top} at least 1")
    options = {"margin": margin, "top": top, "axis_name": axis_name}
    terms, some = rows_mixed(_hard_terms)(embeddings, positive, negative, keep, **options)
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=embeddings.dtype)


def cosine_triplet_loss(
    anchor: Array,
    positive: Array,
    negative: Array,
    *,
    margin: float = 0.5,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns by how much the anchor is not nearer to the positive than to the negative: `max(0, D+ - D- + margin)`.

    Args:
        anchor: float [B, D]; need not be normalised, a zero vector has cosine 0 with everything.
        positive: float [B, D].
        negative: float [B, D], or [B, K, D], of which the mean is taken.
        margin: >= 0.
        where: bool [B], real triplets.
        axis_name: mapped axis over which the triplets are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `anchor`; no triplet
        gives 0.

    Raises:
        ValueError: shapes do not fit or `margin` is negative.

    Example:
        >>> x = jnp.array([[1.0, 0.0]])
        >>> loss = jax.jit(cosine_triplet_loss)
        >>> float(loss(x, x, -x)), float(loss(x, x[:, ::-1], x))
        (0.0, 1.5)

    Source:
        Wang, He, Gupta, arXiv 1708.02901, section 4.
    """
    if anchor.ndim != 2 or positive.shape != anchor.shape:
        raise ValueError(f"anchor and positive must have one shape [B, D], got {anchor.shape} and {positive.shape}")
    rows, size = anchor.shape
    if negative.ndim not in (2, 3) or (negative.shape[0], negative.shape[-1]) != (rows, size):
        raise ValueError(f"negative has shape {negative.shape}, expected ({rows}, {size}) or ({rows}, K, {size})")
    if margin < 0:
        raise ValueError(f"margin={margin} must not be negative")
    keep = checked_where(where, rows, 1.0)
    negative = negative[:, None, :] if negative.ndim == 2 else negative
    anchor_unit, positive_unit, negative_unit = (unit_rows(x, keep) for x in (anchor, positive, negative))
    near = jnp.sum(anchor_unit * positive_unit, axis=1)
    far = jnp.einsum("bd,bkd->bk", anchor_unit, negative_unit, precision=jax.lax.Precision.HIGHEST)
    terms = jnp.mean(jax.nn.relu(far - near[:, None] + margin), axis=1)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=anchor.dtype)


def neighbour_edges(
    features: Array,
    *,
    k: int,
    clusters: Array | None = None,
    mutual: bool = False,
    where: Array | None = None,
) -> Array:
    """Returns the inter-instance edges: each object's k nearest others by the cosine, made symmetric.

    Args:
        features: float [n, D], of one view of each object, by a network trained otherwise.
        k: neighbours of each object, at most those that exist.
        clusters: int [n], for instance from `ops.kmeans`: edges stay inside a cluster.
        mutual: whether both have to be among the other's k nearest; otherwise one is enough.
        where: bool [n], real objects.

    Returns:
        bool [n, n], symmetric, False on the diagonal. No gradient.

    Raises:
        ValueError: shapes do not fit or `k` is below 1.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> jax.jit(lambda x: neighbour_edges(x, k=1))(x).sum().item()
        4

    Source:
        Wang, He, Gupta, arXiv 1708.02901, section 3. Reconstructed: see above.
    """
    if features.ndim != 2 or k < 1:
        raise ValueError(f"features must be [n, D] and k at least 1, got {features.shape} and k={k}")
    keep = checked_where(where, features.shape[0], 1.0)
    if clusters is not None and clusters.shape != keep.shape:
        raise ValueError(f"clusters has shape {clusters.shape}, expected {keep.shape}")
    clusters = jnp.zeros(keep.shape, jnp.int32) if clusters is None else clusters
    return rows_mixed(_neighbours)(jax.lax.stop_gradient(features), clusters, keep, k=k, mutual=mutual)


def transitive_pairs(inter: Array, objects: Array, *, anchors: Array | None = None, kind: str = "transitive") -> Array:
    """Returns which views belong together: views of one object, and ALL views of two objects with an edge.

    With T the views of each object and R the edges: `(I + T)^T R (I + T)` and the pairs within an object.

    Args:
        inter: bool [n, n], symmetric, from `neighbour_edges`.
        objects: int [V], whose view each is; -1 = padding, without pairs.
        anchors: bool [V], the view of each object by which the edges were found; not needed for "transitive" and
            "intra".
        kind: "transitive"; or what it is compared with: "intra", views of one object; "inter", the anchors of two
            objects; "both", these two together, which is multi-task learning.

    Returns:
        bool [V, V], symmetric if `inter` is, False on the diagonal.

    Raises:
        ValueError: shapes do not fit, or `kind` is unknown or lacks `anchors`.

    Example:
        >>> run = jax.jit(lambda inter: transitive_pairs(inter, jnp.array([0, 0, 1, 1])).sum())
        >>> run(jnp.array([[False, True], [True, False]])).item()  # of 4 views, every two
        12

    Source:
        Wang, He, Gupta, arXiv 1708.02901, section 3.
    """
    if inter.ndim != 2 or inter.shape[0] != inter.shape[1] or objects.ndim != 1:
        raise ValueError(f"inter and objects must be [n, n] and [V], got {inter.shape} and {objects.shape}")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if kind in ("both", "inter") and (anchors is None or anchors.shape != objects.shape):
        raise ValueError(f"anchors must be {objects.shape} for kind={kind!r}, got {getattr(anchors, 'shape', None)}")
    anchors = jnp.ones(objects.shape, bool) if anchors is None else anchors
    return rows_mixed(_pairs)(inter, jnp.asarray(objects), anchors, kind=kind)


def transitive_pair_list(neighbours: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Returns `transitive_pairs` as a list, for graphs of which no matrix fits in memory (host).

    Args:
        neighbours: int [n, k], the neighbours of each object; -1 = none. An edge counts in both directions.
        views: int [n, m], the numbers of each object's views; -1 = none.

    Returns:
        NumPy int64 [P, 2], every ordered pair once, in lexicographic order.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import numpy as np
        >>> transitive_pair_list(np.array([[1], [-1]]), np.array([[0, 2], [1, -1]])).tolist()
        [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]

    Source:
        Wang, He, Gupta, arXiv 1708.02901, section 3.
    """
    neighbours, views = np.asarray(neighbours), np.asarray(views)
    if neighbours.ndim != 2 or views.ndim != 2 or len(neighbours) != len(views):
        raise ValueError(f"neighbours and views must be [n, k] and [n, m], got {neighbours.shape} and {views.shape}")
    one = np.repeat(np.arange(len(views)), neighbours.shape[1])
    edges = np.stack([one, neighbours.ravel()], axis=1)[neighbours.ravel() >= 0]
    own = np.stack([np.arange(len(views))] * 2, axis=1)
    edges = np.concatenate([own, edges, edges[:, ::-1]])
    a, b = np.broadcast_arrays(views[edges[:, 0]][:, :, None], views[edges[:, 1]][:, None, :])
    pairs = np.stack([a.ravel(), b.ravel()], axis=1).astype(np.int64)
    pairs = pairs[(pairs >= 0).all(axis=1) & (pairs[:, 0] != pairs[:, 1])]
    return np.unique(pairs, axis=0)


def sample_triplets(key: Array, pairs: Array, related: Array, *, num_triplets: int) -> tuple[Array, Array, Array]:
    """Returns random triplets: a pair, and a view that is unrelated to its anchor.

    Args:
        key: draws pairs (with replacement) and negatives.
        pairs: int [P, 2], P >= 1.
        related: bool [V, V], which views must not be each other's negatives (`transitive_pairs` of all edges); a view
            is never its own.
        num_triplets: how many.

    Returns:
        Anchors, positives and negatives, int32 [num_triplets] each; the negative is -1 where all views are related.

    Raises:
        ValueError: shapes do not fit or `num_triplets` is below 1.

    Example:
        >>> related = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
        >>> run = jax.jit(lambda key: sample_triplets(key, jnp.array([[0, 1]]), related, num_triplets=1))
        >>> [x.tolist() for x in run(jax.random.key(0))]
        [[0], [1], [2]]

    Source:
        Wang, He, Gupta, arXiv 1708.02901, section 4.
    """
    if pairs.ndim != 2 or pairs.shape[0] < 1 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [P >= 1, 2], got {pairs.shape}")
    if related.ndim != 2 or related.shape[0] != related.shape[1] or num_triplets < 1:
        raise ValueError(f"related must be [V, V] and num_triplets at least 1, got {related.shape} and {num_triplets}")
    return rows_mixed(_triplets)(key, jnp.asarray(pairs, jnp.int32), related, count=num_triplets)


def _hard_terms(embeddings, positive, negative, keep, *, margin, top, axis_name):
    unit = unit_rows(embeddings, keep)
    others, exist = gather_rows(unit, axis_name), gather_rows(keep, axis_name)
    if positive.shape[1] != others.shape[0]:
        raise ValueError(
            f"positive has {positive.shape[1]} columns, expected {others.shape[0]}, the rows of all shards"
        )
    scores = jnp.matmul(unit, others.T, precision=jax.lax.Precision.HIGHEST)
    both = keep[:, None] & exist[None, :]
    positive, negative = positive & both, negative & both
    # For each pair the loss is highest where the negative's cosine is: the hardest are those of the anchor.
    top = scores.shape[1] if top is None else min(top, scores.shape[1])
    hardest, index = jax.lax.top_k(jnp.where(negative, scores, -2.0), top)  # cosines are at least -1
    filled = jnp.take_along_axis(negative, index, axis=1)
    hinge = jax.nn.relu(hardest[:, None, :] - scores[:, :, None] + margin)
    pair = masked_mean(hinge, jnp.broadcast_to(filled[:, None, :], hinge.shape), axis=2)
    return masked_mean(pair, positive, axis=1), jnp.any(positive, axis=1) & filled[:, 0]


def _neighbours(features, clusters, keep, *, k, mutual):
    unit = unit_rows(features, keep)
    rows = unit.shape[0]
    scores = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    allowed = keep[:, None] & keep[None, :] & (clusters[:, None] == clusters[None, :]) & ~jnp.eye(rows, dtype=bool)
    _, index = jax.lax.top_k(jnp.where(allowed, scores, -2.0), min(k, rows))
    near = jnp.zeros((rows, rows), bool).at[jnp.arange(rows)[:, None], index].set(True) & allowed
    return near & near.T if mutual else near | near.T


def _pairs(inter, objects, anchors, *, kind):
    real = objects >= 0
    index = jnp.maximum(objects, 0)
    different = ~jnp.eye(objects.shape[0], dtype=bool) & real[:, None] & real[None, :]
    intra = (objects[:, None] == objects[None, :]) & different
    if kind == "intra":
        return intra
    joined = inter[index][:, index] & different
    if kind == "transitive":
        return intra | joined
    joined = joined & anchors[:, None] & anchors[None, :]
    return joined if kind == "inter" else intra | joined


def _triplets(key, pairs, related, *, count):
    key_pair, key_negative = jax.random.split(key)
    drawn = pairs[jax.random.randint(key_pair, (count,), 0, pairs.shape[0])]
    views = related.shape[0]
    free = ~(related | jnp.eye(views, dtype=bool))[drawn[:, 0]]
    # The largest of independent uniform numbers falls on each free view alike.
    ticket = jnp.where(free, jax.random.uniform(key_negative, free.shape), -1.0)
    negative = jnp.where(jnp.any(free, axis=1), jnp.argmax(ticket, axis=1), -1)
    return drawn[:, 0], drawn[:, 1], negative.astype(jnp.int32)
