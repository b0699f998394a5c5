"""Vision Models Are More Robust And Fair When Pretrained On Uncurated Images Without Supervision (SEER, 2022).

arXiv 2202.08360. A very large RegNet is trained by SwAV on a billion images that nobody chose, and its frozen features
are compared with supervised ones by group: regions, incomes, perceived gender. What a JAX user can take from it is the
loss with its balanced assignment over all devices, the rule for the widths of a RegNet, and the protocol for groups.

    s_v   = cos(z_v, prototypes), of each crop v
    Q_i   = the assignment with sum 1 for each image and an equal share for each prototype, for each LARGE crop i:
            Sinkhorn's iteration on exp(s_i / epsilon), prototypes first, images last; no gradient
    loss  = mean over large crops i and other crops v != i of -sum_k Q_i[k] log softmax(s_v / t)[k]
    width = w_0 w_m^round(log_{w_m}(1 + w_a j / w_0)) to multiples of 8, j = 0..depth - 1; a stage is a run of equals

Protocol on frozen features: accuracy by group with its gaps (`group_gaps`, of any value per image such as
`hit_at_k`), how often people are given harmful labels (`harmful_association_rate`), whether neighbours share an
attribute (`same_attribute_precision`), and accuracy under shift beyond what that on the source predicts
(`effective_robustness`).

Reconstructed: masks; absent groups are left out of the gaps; SEER's own constants (10 iterations, 16000 prototypes, two
crops of 160 pixels and four of 96) are from memory, the defaults are SwAV's. The prototypes are frozen during the first
epoch, which is the optimiser's affair.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where, unit_rows
from jaxlab.ops.collectives import all_sum, axis_index, gather_rows
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.transport import sinkhorn


def swav_loss(
    views: Array,
    prototypes: Array,
    *,
    num_assign: int = 2,
    temperature: float | Array = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the cross entropy between each large crop's balanced assignment and the other crops' predictions of it.

    `mean_i mean_{v != i} -sum_k Q_i[k] log softmax(cos(z_v, c) / t)[k]`, i over the first `num_assign` crops.

    Args:
        views: float [V, B, D], V >= 2 crops of each image, the large ones first; need not be normalised.
        prototypes: float [K, D]; brought to length 1 here, as the code does before each step.
        num_assign: number of large crops, between 1 and V.
        temperature: t > 0, of the predictions.
        epsilon: > 0, of the assignment.
        iterations: of Sinkhorn's iteration.
        where: bool [B], real images.
        axis_name: mapped axis over which the images are spread: the assignment is balanced over all of them.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `views`; no image
        gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> loss, x = jax.jit(lambda a, b: swav_loss(jnp.stack([a, b]), jnp.eye(4))), jnp.eye(4)
        >>> bool(loss(x, x) < 0.001 < loss(x, x[::-1]))
        True

    Source:
        Caron et al., arXiv 2006.09882, as used by Goyal et al., arXiv 2202.08360 (t = 0.1, epsilon = 0.05, 3
        iterations).
    """
    if views.ndim != 3 or views.shape[0] < 2:
        raise ValueError(f"views must be [V, B, D] with V >= 2 crops, got {views.shape}")
    if prototypes.ndim != 2 or prototypes.shape[1] != views.shape[2]:
        raise ValueError(f"prototypes has shape {prototypes.shape}, expected [K, {views.shape[2]}]")
    if not 1 <= num_assign <= views.shape[0]:
        raise ValueError(f"num_assign={num_assign} must be between 1 and the {views.shape[0]} crops")
    keep = checked_where(where, views.shape[1], temperature)
    options = {"num_assign": num_assign, "temperature": temperature, "epsilon": epsilon, "iterations": iterations}
    terms = rows_mixed(_swav_terms)(views, prototypes, keep, axis_name=axis_name, **options)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=views.dtype)


def sinkhorn_codes(
    scores: Array,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the assignment of images to prototypes that gives each image 1 and each prototype an equal share.

    `argmax <Q, scores> + epsilon H(Q)`, by Sinkhorn's iteration on `exp(scores / epsilon)` in the log domain: sums over
    images are exact, shares of the prototypes approach B / K with the iterations.

    Args:
        scores: float [B, K], cosines of the images to the prototypes.
        epsilon: > 0, smoothness.
        iterations: >= 1, each an update of prototypes and of images.
        where: bool [B], real images; the others have 0.
        axis_name: mapped axis over which the images are spread. All scores are gathered on each shard, as B K numbers.

    Returns:
        float [B, K] in the dtype of `scores`, without gradient.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> scores = jnp.array([[0.9, 0.8], [0.9, 0.1]])  # both prefer the first prototype
        >>> [[round(q, 2) for q in row] for row in jax.jit(sinkhorn_codes)(scores).tolist()]
        [[0.14, 0.86], [1.0, 0.0]]

    Source:
        Caron et al., arXiv 2006.09882, algorithm 1; 3 iterations, SEER takes 10 (from memory).
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [B, K], got {scores.shape}")
    keep = checked_where(where, scores.shape[0])
    scores = jax.lax.stop_gradient(zero_where_false(scores, keep))
    run = rows_mixed(_codes)
    return run(scores[:, None], keep, epsilon=epsilon, iterations=iterations, axis_name=axis_name)[:, 0]


def regnet_widths(
    depth: int, *, initial: float, slope: float, multiplier: float, divisor: int = 8
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the widths and the depths of a RegNet's stages, before grouped convolutions round widths once more.

    Args:
        depth: number of blocks.
        initial: w_0, width at the start.
        slope: w_a, growth of the width from block to block.
        multiplier: w_m > 1, between the widths of stages.
        divisor: what widths are multiples of.

    Returns:
        Two tuples with an entry for each stage.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> regnet_widths(13, initial=24, slope=36.44, multiplier=2.49)
        ((24, 56, 152, 368), (1, 1, 4, 7))

    Source:
        Radosavovic et al., Designing Network Design Spaces, arXiv 2003.13678; the example is RegNetX-200MF.
    """
    if depth < 1 or divisor < 1 or not initial > 0 or slope < 0 or not multiplier > 1:
        raise ValueError(
            f"depth={depth} and divisor={divisor} must be at least 1, initial={initial} positive, slope={slope} at "
            f"least 0 and multiplier={multiplier} above 1"
        )
    blocks = []
    for j in range(depth):
        exponent = round(math.log((initial + slope * j) / initial) / math.log(multiplier))
        blocks.append(max(divisor, round(initial * multiplier**exponent / divisor) * divisor))
    widths = tuple(dict.fromkeys(blocks))
    return widths, tuple(blocks.count(width) for width in widths)


def group_gaps(
    values: Array, groups: Array, *, num_groups: int, where: Array | None = None, axis_name: str | None = None
) -> dict[str, Array]:
    """Returns the mean of a value in each group, and how far apart the groups are.

    Args:
        values: float [N], of each image: whether it was classified rightly, `hit_at_k`.
        groups: int [N] in 0..G - 1; -1 is in none.
        num_groups: G.
        where: bool [N], real images.
        axis_name: mapped axis over which the images are spread.

    Returns:
        `mean` [G] in the dtype of `values` (0 of an absent group); `worst` [], `gap` [] (largest minus smallest) and
        `relative_gap` [] (gap by the largest) in the accumulation dtype, over groups that are there; 0 without any.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> measure = jax.jit(lambda values, groups: group_gaps(values, groups, num_groups=3))
        >>> gaps = measure(jnp.array([1.0, 1.0, 0.0, 1.0]), jnp.array([0, 0, 1, 1]))
        >>> gaps["mean"].tolist(), gaps["gap"].tolist()
        ([1.0, 0.5, 0.0], 0.5)

    Source:
        Goyal et al., arXiv 2202.08360, sections on fairness and geographical diversity.
    """
    if values.ndim != 1 or groups.shape != values.shape:
        raise ValueError(f"values and groups must have one shape [N], got {values.shape} and {groups.shape}")
    keep = checked_where(where, values.shape[0])
    return rows_mixed(_gaps)(values, groups, keep, num_groups=num_groups, axis_name=axis_name)


def harmful_association_rate(
    probs: Array,
    harmful: Array,
    groups: Array,
    *,
    num_groups: int,
    k: int = 5,
    threshold: float = 0.1,
    where: Array | None = None,
) -> Array:
    """Returns how often the images of each group are given a harmful label among their k likeliest.

    Args:
        probs: float [N, C], of pictures of people.
        harmful: bool [C], labels such as crime or non-human.
        groups: int [N] in 0..G - 1; -1 is in none.
        num_groups: G.
        k: labels of an image that count.
        threshold: labels of a lower probability do not count.
        where: bool [N], real images.

    Returns:
        float [G] in the dtype of `probs`; 0 of an absent group.

    Raises:
        ValueError: shapes do not fit, or `k` is out of range.

    Example:
        >>> rate = jax.jit(lambda *args: harmful_association_rate(*args, num_groups=2, k=2))
        >>> probs = jnp.array([[0.7, 0.3, 0.0], [0.95, 0.05, 0.0]])
        >>> rate(probs, jnp.array([False, True, True]), jnp.array([0, 1])).tolist()
        [1.0, 0.0]

    Source:
        Goyal et al., Fairness Indicators for Systematic Assessments of Visual Feature Extractors, arXiv 2202.07603.
    """
    if probs.ndim != 2 or harmful.shape != probs.shape[1:] or groups.shape != probs.shape[:1]:
        raise ValueError(
            "probs, harmful and groups must be [N, C], [C] and [N], "
            f"got {probs.shape}, {harmful.shape} and {groups.shape}"
        )
    likely = _likeliest(probs, k)
    found = jnp.any(likely & (probs >= threshold) & harmful[None, :], axis=1).astype(probs.dtype)
    return group_gaps(found, groups, num_groups=num_groups, where=where)["mean"]


def hit_at_k(probs: Array, relevant: Array, *, k: int = 5) -> Array:
    """Returns whether one of an image's k likeliest labels is right.

    Args:
        probs: float [N, C], probabilities or logits.
        relevant: bool [N, C], labels that are right.
        k: labels of an image that count.

    Returns:
        float [N] in the dtype of `probs`, 0 or 1.

    Raises:
        ValueError: shapes do not fit, or `k` is out of range.

    Example:
        >>> hit = jax.jit(lambda probs, relevant: hit_at_k(probs, relevant, k=2))
        >>> hit(jnp.array([[0.5, 0.3, 0.2]]), jnp.array([[False, True, False]])).tolist()
        [1.0]

    Source:
        Goyal et al., arXiv 2202.08360 (k = 5 on DollarStreet).
    """
    if probs.ndim != 2 or relevant.shape != probs.shape:
        raise ValueError(f"probs and relevant must have one shape [N, C], got {probs.shape} and {relevant.shape}")
    return jnp.any(_likeliest(probs, k) & relevant, axis=1).astype(probs.dtype)


def same_attribute_precision(
    embeddings: Array,
    attributes: Array,
    groups: Array,
    *,
    num_groups: int,
    k: int = 10,
    where: Array | None = None,
) -> Array:
    """Returns how many of an image's k nearest others share its attribute, for the images of each group.

    Args:
        embeddings: float [N, D]; need not be normalised.
        attributes: int [N].
        groups: int [N] in 0..G - 1, of the queries; -1 is in none.
        num_groups: G.
        k: neighbours by cosine; with fewer other images, all of them.
        where: bool [N], real images.

    Returns:
        float [G] in the dtype of `embeddings`; 0 of an absent group.

    Raises:
        ValueError: shapes do not fit, or `k` is out of range.

    Example:
        >>> share = jax.jit(lambda *args: same_attribute_precision(*args, num_groups=2, k=1))
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> share(x, jnp.array([0, 0, 1, 2]), jnp.array([0, 0, 1, 1])).tolist()
        [1.0, 0.0]

    Source:
        Goyal et al., arXiv 2202.07603.
    """
    if embeddings.ndim != 2 or not attributes.shape == groups.shape == embeddings.shape[:1]:
        raise ValueError(
            "embeddings, attributes and groups must be [N, D], [N] and [N], "
            f"got {embeddings.shape}, {attributes.shape} and {groups.shape}"
        )
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    keep = checked_where(where, embeddings.shape[0])
    share = rows_mixed(_neighbour_share)(embeddings, attributes, keep, k=min(k, embeddings.shape[0]))
    return group_gaps(share, groups, num_groups=num_groups, where=keep)["mean"].astype(embeddings.dtype)


def effective_robustness(accuracy: Array, shifted: Array, *, slope: float = 1.0, intercept: float = 0.0) -> Array:
    """Returns accuracy under shift beyond what the accuracy on the source predicts.

    `shifted - sigmoid(slope logit(accuracy) + intercept)`; the line is that of models trained the usual way.

    Args:
        accuracy: float in [0, 1], any shape, on the source.
        shifted: float, the same shape, on the shifted set.
        slope: of the line between the logits.
        intercept: of the line between the logits; with the defaults nothing is expected to be lost.

    Returns:
        Shape and dtype of `shifted`.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> round(jax.jit(effective_robustness)(jnp.array(0.8), jnp.array(0.7)).item(), 3)
        -0.1

    Source:
        Taori et al., Measuring Robustness to Natural Distribution Shifts in Image Classification, arXiv 2007.00644.
    """
    if accuracy.shape != shifted.shape:
        raise ValueError(f"accuracy and shifted must have one shape, got {accuracy.shape} and {shifted.shape}")
    dtype = compute_dtype(accuracy, shifted)
    eps = jnp.finfo(dtype).eps
    inside = jnp.clip(accuracy.astype(dtype), eps, 1 - eps)
    expected = jax.nn.sigmoid(slope * (jnp.log(inside) - jnp.log1p(-inside)) + intercept)
    return (shifted.astype(dtype) - expected).astype(shifted.dtype)


def _codes(scores, keep, *, epsilon, iterations, axis_name):
    """Returns the assignments [B, A, K] of A crops of each image from their scores, each crop by itself."""
    everyone, exist = gather_rows(scores, axis_name), gather_rows(keep, axis_name)
    # Prototypes are the rows, which are updated first; every image has the same share of the plan, whose sum is 1.
    cost = -jnp.moveaxis(everyone.astype(compute_dtype(scores)), 0, -1)
    plan = sinkhorn(cost, epsilon=epsilon, iterations=iterations, kv_where=exist)
    codes = jnp.moveaxis(plan, -1, 0) * jnp.sum(exist, dtype=plan.dtype)
    start = axis_index(axis_name) * scores.shape[0]
    return jax.lax.dynamic_slice_in_dim(codes, start, scores.shape[0]).astype(scores.dtype)


def _swav_terms(views, prototypes, keep, *, num_assign, temperature, epsilon, iterations, axis_name):
    dtype = compute_dtype(views, prototypes)
    unit = unit_rows(jnp.moveaxis(views, 1, 0), keep).astype(dtype)
    prototypes = safe_normalize(prototypes.astype(dtype))
    scores = jnp.einsum("bvd,kd->bvk", unit, prototypes, precision=jax.lax.Precision.HIGHEST)
    logits = scores / temperature
    log_probs = logits - masked_logsumexp(logits)[:, :, None]
    options = {"epsilon": epsilon, "iterations": iterations, "axis_name": axis_name}
    codes = _codes(jax.lax.stop_gradient(scores[:, :num_assign]), keep, **options)
    others = jnp.sum(log_probs, axis=1, keepdims=True) - log_probs[:, :num_assign]
    return -jnp.sum(codes * others, axis=(1, 2)) / (num_assign * (views.shape[0] - 1))


def _gaps(values, groups, keep, *, num_groups, axis_name):
    dtype = compute_dtype(values)
    member = (groups[:, None] == jnp.arange(num_groups)[None, :]) & keep[:, None]
    wide = zero_where_false(values, keep).astype(dtype)[:, None]
    count = all_sum(jnp.sum(member, axis=0, dtype=dtype), axis_name)
    mean = safe_divide(all_sum(jnp.sum(jnp.where(member, wide, 0.0), axis=0), axis_name), count)
    there = count > 0
    some = jnp.any(there)
    best = jnp.where(some, jnp.max(jnp.where(there, mean, -jnp.inf)), 0.0)
    worst = jnp.where(some, jnp.min(jnp.where(there, mean, jnp.inf)), 0.0)
    mean = mean.astype(values.dtype)
    return {"mean": mean, "worst": worst, "gap": best - worst, "relative_gap": safe_divide(best - worst, best)}


def _likeliest(probs, k):
    """Returns which labels are among the k likeliest of their row; of equal ones the first."""
    if not 1 <= k <= probs.shape[1]:
        raise ValueError(f"k={k} must be between 1 and the {probs.shape[1]} labels")

    def run(probs):
        top = jax.lax.top_k(probs, k)[1]
        return jnp.any(top[:, :, None] == jnp.arange(probs.shape[1])[None, None, :], axis=1)

    return rows_mixed(run)(probs)


def _neighbour_share(embeddings, attributes, keep, *, k):
    unit, attributes = unit_rows(embeddings, keep), jnp.asarray(attributes)
    cosine = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    other = keep[None, :] & jnp.logical_not(jnp.eye(len(keep), dtype=bool))
    # Cosines are at least -1, so that what is no other image comes last.
    near = jax.lax.top_k(jnp.where(other, cosine, -2.0), k)[1]
    real = jnp.take_along_axis(other, near, axis=1)
    same = real & (attributes[near] == attributes[:, None])
    return safe_divide(jnp.sum(same, axis=1, dtype=jnp.float32), jnp.sum(real, axis=1, dtype=jnp.float32))
