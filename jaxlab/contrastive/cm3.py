"""CM^3: Calibrating Multimodal Recommendation (2025, arXiv 2508.01226).

A graph recommender that is trained by alignment and uniformity. Items are pushed apart only as far as their text and
images differ, and any number of modalities is mixed along a curve on the sphere, at a random place in each step.

    mix        = Bezier curve on the sphere through the projected modalities at ratio r ~ Beta(a, a), an item each
    x          = [norm(modality 1), .., norm(modality M), norm(id)]: items have MLPs of their features, the last part
                 being mix; users have free embeddings
    h          = sum_l A^l x, l = 0..L, A the normalised graph of users and items
    users      = h, each part weighed by a softmax of the user's own;   items = h + S h, S the neighbours by features
    loss       = E |u - i+|^2 + gamma / 2 (log E exp(-2 |u - u'|^2) + log E exp(-2 (|i- - j-|^2 - 2 + 2 s_ij)))
    s_ij       = cos(mix_i, mix_j), clipped to [low, high];   u, i at length 1

Since |i - j|^2 = 2 - 2 cos, the calibrated term is exp(4 (cos(i, j) - s_ij)): two items are as far apart as they should
be where their cosine is that of their features. With s = 1 it is the plain uniformity, and with s = 0 the same + 4.

Reconstructed: masks; `key=None` mixes at r = 1/2 (the code draws for the evaluation, too); one place r for a curve of
more than two modalities; biases of the projections start at 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where, own_columns, unit_rows
from jaxlab.contrastive.hard_contrastive import alignment, uniformity
from jaxlab.ops.collectives import all_sum, gather_rows
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide, safe_normalize
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InteractionGraph:
    """Who took what, and which items resemble each other; made by `interaction_graph`.

    Attributes:
        users: int32 [E], user of each interaction.
        items: int32 [E], item of each interaction.
        weights: float32 [E], `1 / sqrt(degree of the user * degree of the item)`; 0 on padding.
        neighbours: int32 [I, K], items that resemble each item.
        neighbour_weights: float32 [I, K].
    """

    users: Array
    items: Array
    weights: Array
    neighbours: Array
    neighbour_weights: Array


def cm3_loss(
    users: Array,
    positives: Array,
    negatives: Array,
    features: Array,
    *,
    gamma: float = 0.5,
    t: float = 2.0,
    low: float = 0.0,
    high: float = 1.0,
    stop_gradient: bool = False,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the alignment of users with their items plus gamma / 2 times the two uniformities.

    `E |u - i+|^2 + gamma / 2 (uniformity(u) + calibrated_uniformity(i-, features))`.

    Args:
        users: float [B, D]; need not be normalised.
        positives: float [B, D], an item of each user.
        negatives: float [B, D], items drawn uniformly.
        features: float [B, F], mixed features of the negatives (third result of `cm3`).
        gamma: weight of uniformity; the paper searches 0.5 and 0.9.
        t: > 0, of both uniformities.
        low: smallest similarity that counts.
        high: largest similarity that counts; the paper searches 0.8 and 1.
        stop_gradient: whether the features' similarities are constants (in the paper they are not).
        where: bool [B], real rows.
        axis_name: mapped axis over which the rows are spread: pairs across all shards.

    Returns:
        Scalar in the accumulation dtype; 0 without rows.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> u, i, far, f = jnp.eye(4)[:2], jnp.eye(4)[:2], jnp.eye(4)[2:], jnp.eye(2)
        >>> loss = jax.jit(cm3_loss)
        >>> round(loss(u, i, far, f).item(), 3), round(loss(u, far, i, f).item(), 3)
        (-1.0, 1.0)

    Source:
        Zhou et al., arXiv 2508.01226; code enoche/CM3.
    """
    if users.ndim != 2 or not users.shape == positives.shape == negatives.shape:
        raise ValueError(
            "users, positives and negatives must have one shape [B, D], "
            f"got {users.shape}, {positives.shape} and {negatives.shape}"
        )
    options = {"where": where, "axis_name": axis_name}
    spread = uniformity(users, t=t, **options) + calibrated_uniformity(
        negatives, features, t=t, low=low, high=high, stop_gradient=stop_gradient, **options
    )
    return alignment(users, positives, **options) + gamma / 2 * spread


def calibrated_uniformity(
    embeddings: Array,
    features: Array,
    *,
    t: float = 2.0,
    low: float = 0.0,
    high: float = 1.0,
    stop_gradient: bool = False,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns how evenly embeddings are spread, where those with similar features may stay together.

    `log mean over pairs of exp(-t (|x_i - x_j|^2 - 2 + 2 clip(cos(f_i, f_j), low, high)))`, x at length 1.

    Args:
        embeddings: float [N, D]; need not be normalised.
        features: float [N, F]; need not be normalised.
        t: > 0.
        low: smallest similarity that counts.
        high: largest similarity that counts, at least `low`.
        stop_gradient: whether the features' similarities are constants.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: pairs across all shards.

    Returns:
        Scalar in the accumulation dtype; 0 with fewer than two examples.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> round(jax.jit(calibrated_uniformity)(jnp.eye(2), jnp.ones((2, 3))).item(), 4)  # as uniformity(jnp.eye(2))
        -4.0

    Source:
        Zhou et al., arXiv 2508.01226; t = 2 and low = 0 in the code, high = 0.8 or 1.
    """
    if embeddings.ndim != 2 or features.ndim != 2 or features.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"embeddings and features must be [N, D] and [N, F], got {embeddings.shape} and {features.shape}"
        )
    if not t > 0:
        raise ValueError(f"t={t} must be positive")
    if not low <= high:
        raise ValueError(f"low={low} must be at most high={high}")
    keep = checked_where(where, embeddings.shape[0])
    features = jax.lax.stop_gradient(features) if stop_gradient else features
    return rows_mixed(_calibrated)(embeddings, features, keep, t=t, low=low, high=high, axis_name=axis_name)


def spherical_bezier(points: Array, ratio: Array | float) -> Array:
    """Returns points on the curve of de Casteljau's construction with great circles; of two points, their slerp.

    `slerp(a, b) = (sin(ratio theta) a + sin((1 - ratio) theta) b) / sin(theta)`, theta the angle between a and b, of
    each pair of neighbours, and again of the results until one is left.

    Args:
        points: float [M, ..., D], M >= 1 control points; need not be normalised.
        ratio: float [...] or a number, in [0, 1]: 1 gives the first point, 0 the last.

    Returns:
        float [..., D] in the dtype of `points`, of length 1. Opposite points, which many shortest arcs join, are mixed
        along the straight line, and in its middle the result is 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> [round(x, 3) for x in jax.jit(spherical_bezier)(jnp.eye(2), 2 / 3).tolist()]  # 30 degrees from the first
        [0.866, 0.5]

    Source:
        Zhou et al., arXiv 2508.01226; code enoche/CM3 (two modalities). Reconstructed: points closer than the dtype
        resolves.
    """
    if points.ndim < 2 or points.shape[0] < 1:
        raise ValueError(f"points must be [M >= 1, ..., D], got {points.shape}")
    dtype = compute_dtype(points)
    ratio = jnp.asarray(ratio, dtype)
    if ratio.shape not in ((), points.shape[1:-1]):
        raise ValueError(f"ratio has shape {ratio.shape}, expected {points.shape[1:-1]}, a number for each point")
    ratio = jnp.broadcast_to(ratio, points.shape[1:-1])[None, ..., None]
    curve = safe_normalize(points.astype(dtype))
    while curve.shape[0] > 1:
        curve = _slerp(curve[:-1], curve[1:], ratio)
    return curve[0].astype(points.dtype)


def interaction_graph(
    users: Array,
    items: Array,
    features: Sequence[Array],
    *,
    num_users: int,
    k: int = 10,
    feature_weights: Sequence[float] | None = None,
    where: Array | None = None,
) -> InteractionGraph:
    """Returns the normalised graph of users and items, and the neighbours of the items by their features.

    Args:
        users: int [E], user of each interaction.
        items: int [E], item of each interaction; a pair stands once.
        features: a float [I, F_m] for each modality, of all items.
        num_users: U.
        k: neighbours of an item in each modality by cosine, itself included, of weight 1 / k each.
        feature_weights: of the modalities' neighbours (the code takes 0.9 for text and 0.1 for images); None = equal.
        where: bool [E], real interactions.

    Returns:
        An `InteractionGraph`; constants, without gradient.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.

    Example:
        >>> make = jax.jit(lambda u, i: interaction_graph(u, i, [jnp.eye(2)], num_users=2, k=1))
        >>> graph = make(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]))
        >>> [round(w, 3) for w in graph.weights.tolist()], graph.neighbours.tolist()
        ([0.707, 0.5, 0.707], [[0], [1]])

    Source:
        Zhou et al., arXiv 2508.01226; code enoche/CM3 (k = 10).
    """
    features = list(features)
    if users.ndim != 1 or users.shape != items.shape:
        raise ValueError(f"users and items must have one shape [E], got {users.shape} and {items.shape}")
    if not features or any(f.ndim != 2 or f.shape[0] != features[0].shape[0] for f in features):
        raise ValueError(f"features must be [I, F] for each modality, got {[f.shape for f in features]}")
    if not 1 <= k <= features[0].shape[0]:
        raise ValueError(f"k={k} must be between 1 and the {features[0].shape[0]} items")
    if num_users < 1:
        raise ValueError(f"num_users={num_users} must be at least 1")
    shares = [1 / len(features)] * len(features) if feature_weights is None else list(feature_weights)
    if len(shares) != len(features):
        raise ValueError(f"feature_weights has {len(shares)} entries, expected {len(features)}, one for each modality")
    keep = checked_where(where, users.shape[0])
    return rows_mixed(_graph)(users, items, features, keep, num_users=num_users, k=k, shares=shares)


def cm3(
    num_users: int, *, size: int = 64, num_layers: int = 3, item_layers: int = 1, concentration: float = 0.5
) -> Layer:
    """Returns the network: `users, items, mix = apply(params, features, graph, key=None)`.

    `init(key, *sizes)` takes the number of features of each modality. `features` is a list of float [I, F_m] and
    `graph` an `InteractionGraph`; a key draws the places of the mixture, None takes the middle. `users` [U, (M + 1)
    size] and `items` [I, (M + 1) size] are not normalised: their product is the score, `cm3_loss` normalises. `mix`
    [I, size] are the mixed features.

    Args:
        num_users: U.
        size: d, of each part.
        num_layers: L >= 0, steps on the graph of users and items; the paper searches 3 and 4.
        item_layers: >= 0, steps on the graph of items.
        concentration: a > 0, of the places r ~ Beta(a, a); the paper searches 0.1, 0.5 and 0.9.

    Raises:
        ValueError: an option is out of range, or `features` are not those of `init`.

    Example:
        >>> net, features = cm3(2, size=4), [jnp.eye(3), jnp.ones((3, 2))]
        >>> def run(key, users, items):
        ...     graph = interaction_graph(users, items, features, num_users=2, k=1)
        ...     return net.apply(net.init(key, 3, 2), features, graph)
        >>> [x.shape for x in jax.eval_shape(run, jax.random.key(0), jnp.array([0, 1]), jnp.array([0, 2]))]
        [(2, 12), (3, 12), (3, 4)]

    Source:
        Zhou et al., arXiv 2508.01226; code enoche/CM3 (d = 64).
    """
    if min(num_users, size) < 1 or min(num_layers, item_layers) < 0:
        raise ValueError(
            f"num_users={num_users} and size={size} must be at least 1, num_layers={num_layers} and "
            f"item_layers={item_layers} at least 0"
        )
    if not concentration > 0:
        raise ValueError(f"concentration={concentration} must be positive")
    # Variances of PyTorch's linear layers (1 / 3 of the inputs' inverse), and Xavier's for what the paper sets itself.
    wide, narrow = dense(4 * size, scale=1 / 3), dense(size, bias=False, scale=1 / 3)

    def init(key, *sizes):
        if not sizes:
            raise ValueError("init needs the number of features of each modality, got none")
        key_share, key_id, *keys = jax.random.split(key, 2 + len(sizes))
        free = lambda key: jax.random.normal(key, (num_users, size)) * (2 / (num_users + size)) ** 0.5
        params = {
            "share": jax.random.normal(key_share, (num_users, len(sizes) + 1))
            * (2 / (num_users + len(sizes) + 1)) ** 0.5,
            "user_id": free(key_id),
        }
        for m, (key, inputs) in enumerate(zip(keys, sizes, strict=True)):
            key_wide, key_narrow, key_mix, key_user = jax.random.split(key, 4)
            project = dense(size, scale=2 * inputs / (inputs + size))
            params[f"modality_{m}"] = {
                "wide": wide.init(key_wide, inputs),
                "narrow": narrow.init(key_narrow, 4 * size),
                "project": project.init(key_mix, inputs),
                "user": free(key_user),
            }
        return params

    def apply(params, features, graph, *, key=None):
        count = sum(name.startswith("modality_") for name in params)
        if len(features) != count or any(f.ndim != 2 for f in features):
            raise ValueError(f"features must be {count} arrays [I, F], got {[f.shape for f in features]}")
        dtype, items = features[0].dtype, features[0].shape[0]
        modalities = [params[f"modality_{m}"] for m in range(count)]
        project = dense(size)
        points = jnp.stack([project.apply(p["project"], f) for p, f in zip(modalities, features, strict=True)])
        half = jnp.full((items,), 0.5, jnp.float32)
        ratio = half if key is None else jax.random.beta(key, concentration, concentration, (items,))
        mix = spherical_bezier(points, ratio)
        own = [
            narrow.apply(p["narrow"], jax.nn.leaky_relu(wide.apply(p["wide"], f)))
            for p, f in zip(modalities, features, strict=True)
        ]
        free = [p["user"] for p in modalities] + [params["user_id"]]
        join = lambda parts: jnp.concatenate([safe_normalize(part.astype(dtype)) for part in parts], axis=1)
        users, items = rows_mixed(_propagate)(join(free), join([*own, mix]), graph, steps=num_layers)
        share = jax.nn.softmax(params["share"].astype(compute_dtype(users)), axis=1)
        users = (users.reshape(num_users, count + 1, size) * share[:, :, None]).reshape(num_users, -1)
        near = items
        for _ in range(item_layers):
            near = rows_mixed(_neighbour_sum)(near, graph)
        return users.astype(dtype), (items + near).astype(dtype), mix

    return Layer(init, apply)


def recall_and_ndcg(
    scores: Array,
    relevant: Array,
    *,
    k: int = 20,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Returns recall@k and NDCG@k of ranking each user's candidates by score.

    `recall = hits among the first k / relevant`, `NDCG = sum over hits of 1 / log2(rank + 1)` as a share of the best.

    Args:
        scores: float [U, I].
        relevant: bool [U, I], what each user took.
        k: length of the list; with fewer items, all of them.
        where: bool [U, I], candidates (leave out what was trained on); others are neither ranked nor relevant.
        axis_name: mapped axis over which the users are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[U]` each.

    Returns:
        Two scalars in the accumulation dtype, or `[U]` in the dtype of `scores`. A user to whom nothing is relevant is
        no term. Without gradient; equal scores rank in the order of the items.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> rank = jax.jit(lambda scores, relevant: recall_and_ndcg(scores, relevant, k=2))
        >>> recall, ndcg = rank(jnp.array([[0.3, 0.2, 0.1]]), jnp.array([[True, False, True]]))
        >>> round(recall.item(), 4), round(ndcg.item(), 4)
        (0.5, 0.6131)

    Source:
        Jarvelin and Kekalainen, Cumulated gain-based evaluation of IR techniques, 2002, as in arXiv 2508.01226.
    """
    if scores.ndim != 2 or relevant.shape != scores.shape:
        raise ValueError(f"scores and relevant must have one shape [U, I], got {scores.shape} and {relevant.shape}")
    if where is not None and where.shape != scores.shape:
        raise ValueError(f"where has shape {where.shape}, expected {scores.shape}, as scores")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    exist = jnp.ones(scores.shape, bool) if where is None else where
    wanted = exist & relevant
    terms = rows_mixed(_recall_and_ndcg)(jax.lax.stop_gradient(scores), wanted, exist, k=min(k, scores.shape[1]))
    some = jnp.any(wanted, axis=1)
    options = {"reduction": reduction, "axis_name": axis_name, "dtype": scores.dtype}
    return tuple(reduce_terms(term, some, **options) for term in terms)


def _calibrated(embeddings, features, keep, *, t, low, high, axis_name):
    unit, kind = unit_rows(embeddings, keep), unit_rows(features, keep)
    others, kinds, exist = (gather_rows(x, axis_name) for x in (unit, kind, keep))
    own = own_columns(unit.shape[0], others.shape[0], axis_name)
    pair = keep[:, None] & exist[None, :] & jnp.logical_not(own)
    product = lambda a, b: jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    length = lambda x: jnp.sum(x * x, axis=1)
    distance = length(unit)[:, None] + length(others)[None, :] - 2 * product(unit, others)
    likeness = jnp.clip(product(kind, kinds), low, high)
    near = jnp.exp(-t * jnp.where(pair, distance - 2 + 2 * likeness, 0.0))
    count = all_sum(jnp.sum(pair, dtype=near.dtype), axis_name)
    mean = safe_divide(all_sum(masked_sum(near, pair), axis_name), count)
    return jnp.log(jnp.where(count > 0, mean, 1.0))


def _slerp(a, b, ratio):
    """Returns points between unit vectors a (ratio 1) and b (ratio 0), of length 1."""
    cosine = jnp.sum(a * b, axis=-1, keepdims=True)
    # An angle near 0 or pi has no usable sine; there the straight line is the arc up to rounding.
    flat = jnp.abs(cosine) > 1 - 4 * jnp.finfo(cosine.dtype).eps
    angle = jnp.arccos(jnp.where(flat, 0.0, cosine))
    first = jnp.where(flat, ratio, jnp.sin(ratio * angle) / jnp.sin(angle))
    second = jnp.where(flat, 1 - ratio, jnp.sin((1 - ratio) * angle) / jnp.sin(angle))
    return safe_normalize(first * a + second * b)


def _graph(users, items, features, keep, *, num_users, k, shares):
    users, items = (jnp.where(keep, index, 0).astype(jnp.int32) for index in (users, items))
    real = keep.astype(jnp.float32)
    degree = lambda index, count: jax.ops.segment_sum(real, index, count)[index]
    product = degree(users, num_users) * degree(items, features[0].shape[0])
    weights = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, product, 1.0)), 0.0)
    near = []
    for feature in features:
        unit = safe_normalize(jax.lax.stop_gradient(feature).astype(compute_dtype(feature)))
        near.append(jax.lax.top_k(jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST), k)[1])
    share = jnp.concatenate(
        [jnp.full(index.shape, s / k, jnp.float32) for index, s in zip(near, shares, strict=True)], 1
    )
    return InteractionGraph(users, items, weights, jnp.concatenate(near, axis=1).astype(jnp.int32), share)


def _propagate(users, items, graph, *, steps):
    """Returns `sum_l A^l x` of users and items, in the accumulation dtype."""
    dtype = compute_dtype(users)
    weights = graph.weights.astype(dtype)[:, None]
    users, items = users.astype(dtype), items.astype(dtype)
    total = users, items
    for _ in range(steps):
        users, items = (
            jax.ops.segment_sum(weights * items[graph.items], graph.users, users.shape[0]),
            jax.ops.segment_sum(weights * users[graph.users], graph.items, items.shape[0]),
        )
        total = total[0] + users, total[1] + items
    return total


def _neighbour_sum(items, graph):
    return jnp.einsum("ik,ikd->id", graph.neighbour_weights.astype(items.dtype), items[graph.neighbours])


def _recall_and_ndcg(scores, wanted, exist, *, k):
    dtype = compute_dtype(scores)
    order = jnp.argsort(jnp.where(exist, -scores.astype(dtype), jnp.inf), axis=1)[:, :k]
    hit = jnp.take_along_axis(wanted, order, axis=1).astype(dtype)
    gain = 1 / jnp.log2(jnp.arange(k, dtype=dtype) + 2)
    total = jnp.sum(wanted, axis=1)
    best = jnp.sum(jnp.where(jnp.arange(k)[None, :] < total[:, None], gain[None, :], 0.0), axis=1)
    recall = safe_divide(jnp.sum(hit, axis=1), total.astype(dtype))
    return recall, safe_divide(jnp.sum(hit * gain[None, :], axis=1), best)
