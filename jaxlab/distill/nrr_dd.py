"""Enhancing Dataset Distillation via Non-Critical Region Refinement (NRR-DD, 2025, arXiv 2503.18267).

A small data set is composed of real patches, which hold the detail of single images; the pixels that do not matter for
their class are then optimised to carry what is general about it. A student trained on it needs no stored soft labels:
two distances for each mixed image stand for the teacher's prediction.

    C   = class activation map of the teacher, scaled to 0..1;      M = max(0, threshold - C)
    x  <- x - eta M * grad_x [ CE(f(x), y) + weight * sum_l (|mu_l - mu_l^run|^2 + |var_l - var_l^run|^2) ]
    d_a = -log p[y_a],  d_b = -log p[y_b]    for a mix of an image of class y_a and one of class y_b
    L   = share CE(y_a) + (1 - share) CE(y_b) + |d_a - d_a^T|^power + |d_b - d_b^T|^power

Pixels with C >= threshold keep their exact values. Patches: of the crops of an image those with the highest activation,
of these the ones of which the teacher is least sure.

Reconstructed (the code was not at hand): threshold 0.5, power 1, the weights of the terms, and the size of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def distance_loss(
    logits: Array,
    labels: Array,
    mixed_labels: Array,
    distances: Array,
    *,
    power: int = 1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far a student's two distances are from its teacher's.

    `|d_a - d_a^T|^power + |d_b - d_b^T|^power`, see `label_distances`.

    Args:
        logits: float [N, C], the student's for the mixed images.
        labels: int [N], y_a; -1 = unlabelled, no term.
        mixed_labels: int [N], y_b.
        distances: float [N, 2], the teacher's, stored; no gradient reaches them.
        power: 1 or 2.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `logits`; 0 without any
        example.

    Raises:
        ValueError: shapes do not fit or `power` is neither 1 nor 2.

    Example:
        >>> z, a, b = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([0]), jnp.array([1])
        >>> float(jax.jit(lambda z: distance_loss(z, a, b, label_distances(z, a, b)))(z))
        0.0

    Source:
        Tran et al., arXiv 2503.18267, distance-based representative transfer.
    """
    if power not in (1, 2):
        raise ValueError(f"power={power} must be 1 or 2")
    if distances.shape != (*logits.shape[:1], 2):
        raise ValueError(f"distances has shape {distances.shape}, expected {(*logits.shape[:1], 2)}")
    if where is not None and where.shape != logits.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {logits.shape[:1]}")
    exist = (labels >= 0) & (mixed_labels >= 0)
    keep = exist if where is None else exist & where
    dtype = compute_dtype(logits)
    own = label_distances(zero_where_false(logits, keep).astype(dtype), labels, mixed_labels)
    apart = own - zero_where_false(jax.lax.stop_gradient(distances), keep).astype(dtype)
    terms = jnp.sum(jnp.abs(apart) if power == 1 else jnp.square(apart), axis=-1)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def label_distances(logits: Array, labels: Array, mixed_labels: Array) -> Array:
    """Returns the two numbers that are stored for a mixed image instead of C probabilities.

    `(-log softmax(z)[y_a], -log softmax(z)[y_b])`: cross entropies to the two one-hot labels.

    Args:
        logits: float [N, C].
        labels: int [N], y_a.
        mixed_labels: int [N], y_b; negative labels count as class 0.

    Returns:
        float [N, 2] in the dtype of `logits`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> bool(jnp.allclose(label_distances(jnp.zeros((1, 2)), jnp.array([0]), jnp.array([1])), jnp.log(2.0)))
        True

    Source:
        Tran et al., arXiv 2503.18267.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or mixed_labels.shape != labels.shape:
        raise ValueError(
            f"logits, labels and mixed_labels must be [N, C], [N] and [N], got {logits.shape}, {labels.shape} and "
            f"{mixed_labels.shape}"
        )
    log_p = jax.nn.log_softmax(logits.astype(compute_dtype(logits)))
    both = jnp.maximum(jnp.stack([labels, mixed_labels], axis=1), 0)
    return -jnp.take_along_axis(log_p, both, axis=1).astype(logits.dtype)


def class_activation_map(features: Array, weights: Array, labels: Array, *, size: tuple[int, int]) -> Array:
    """Returns where the teacher sees the class, from 0 (least) to 1 (most) in each image.

    `C = relu(sum_c A_c W_cy)`, resized linearly, then scaled to 0..1; a constant map is 0.

    Args:
        features: float [N, h, w, c], the last convolution's output A.
        weights: float [c, C], of the classifier behind the mean over positions.
        labels: int [N].
        size: height and width of the result.

    Returns:
        float [N, *size] in the dtype of `features`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> features = jnp.array([[[[0.0], [1.0]], [[2.0], [4.0]]]])
        >>> seen = jax.jit(class_activation_map, static_argnames="size")
        >>> seen(features, jnp.ones((1, 1)), jnp.array([0]), size=(2, 2)).tolist()
        [[[0.0, 0.25], [0.5, 1.0]]]

    Source:
        Zhou et al., Learning Deep Features for Discriminative Localization, arXiv 1512.04150.
    """
    if features.ndim != 4 or weights.ndim != 2 or weights.shape[0] != features.shape[-1]:
        raise ValueError(f"features and weights must be [N, h, w, c] and [c, C], got {features.shape}, {weights.shape}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {features.shape[:1]}")
    wide = features.astype(compute_dtype(features))
    own = rows_mixed(lambda w, y: w[:, y].T)(weights.astype(wide.dtype), labels)
    seen = jax.nn.relu(jnp.einsum("nhwc,nc->nhw", wide, own, precision=jax.lax.Precision.HIGHEST))
    seen = jax.image.resize(seen, (len(seen), *size), "linear", antialias=False)
    low = jnp.min(seen, axis=(1, 2), keepdims=True)
    return safe_divide(seen - low, jnp.max(seen, axis=(1, 2), keepdims=True) - low).astype(features.dtype)


def refine_non_critical(
    x: Array,
    activation: Array,
    loss: Callable[[Array], Array],
    *,
    steps: int,
    learning_rate: float = 0.1,
    threshold: float = 0.5,
) -> Array:
    """Returns the images after gradient steps on the pixels that do not matter for their class.

    `x <- x - learning_rate * max(0, threshold - C) * grad loss(x)`.

    Args:
        x: float [N, H, W, channels].
        activation: float [N, H, W], C in 0..1 (see `class_activation_map`).
        loss: `loss(x)`, a scalar; a mean over images makes steps shrink with N, so prefer their sum.
        steps: number of steps.
        learning_rate: eta.
        threshold: pixels with C at or above it keep their exact values.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: shapes do not fit or `steps` is negative.

    Example:
        >>> x, seen = jnp.ones((1, 1, 2, 1)), jnp.array([[[0.0, 0.9]]])
        >>> refine_non_critical(x, seen, lambda x: jnp.sum(x), steps=2, learning_rate=0.5).reshape(-1).tolist()
        [0.5, 1.0]

    Source:
        Tran et al., arXiv 2503.18267, non-critical region refinement.
    """
    if x.ndim != 4 or activation.shape != x.shape[:3]:
        raise ValueError(f"x and activation must be [N, H, W, channels] and [N, H, W], got {x.shape}, "
                         f"{activation.shape}")  # fmt: skip
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    room = jnp.maximum(threshold - jax.lax.stop_gradient(activation), 0.0)[..., None].astype(x.dtype)

    def step(x, _):
        move = (learning_rate * room * jax.grad(loss)(x)).astype(x.dtype)
        # Where nothing may move not even the sign of a zero does.
        return jnp.where(room > 0, x - move, x), None

    return jax.lax.scan(step, match_varying(x, room)[0], None, length=steps)[0]


def statistics_loss(statistics: Sequence[tuple[Array, Array]], running: Sequence[tuple[Array, Array]]) -> Array:
    """Returns how far the layers' statistics for synthetic images are from those the teacher remembers.

    `sum_l |mu_l - mu_l^run|^2 + |var_l - var_l^run|^2`.

    Args:
        statistics: for each layer mean and variance, float [channels].
        running: the same of the normalisations' memory; no gradient reaches them.

    Returns:
        Scalar in the accumulation dtype.

    Raises:
        ValueError: the lists differ in length.

    Example:
        >>> float(statistics_loss([(jnp.ones(2), jnp.ones(2))], [(jnp.zeros(2), jnp.ones(2))]))
        2.0

    Source:
        Yin et al., Dreaming to Distill, arXiv 1912.08795, eq. 4, as NRR-DD uses it.
    """
    if len(statistics) != len(running) or not statistics:
        raise ValueError(f"statistics and running must have as many layers, got {len(statistics)} and {len(running)}")
    total = 0.0
    for own, kept in zip(statistics, jax.lax.stop_gradient(list(running)), strict=True):
        for a, b in zip(own, kept, strict=True):
            dtype = compute_dtype(a)
            total = total + jnp.sum(jnp.square(a.astype(dtype) - b.astype(dtype)))
    return total


def select_patches(activation: Array, confidence: Array, *, top: int, count: int, where: Array | None = None) -> Array:
    """Returns the crops of a class that show it and of which the teacher is least sure.

    Of each image's crops the `top` with the highest mean activation; of all these the `count` with the lowest
    confidence.

    Args:
        activation: float [N, P], mean activation of P crops of each of the class's N images.
        confidence: float [N, P], the teacher's probability of the class.
        top: crops kept for each image, 1 .. P.
        count: crops chosen, 1 .. N top.
        where: bool [N], real images.

    Returns:
        int32 [count], flat numbers `image * P + crop`, the least sure first; -1 where the images do not suffice.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.

    Example:
        >>> activation, confidence = jnp.array([[0.9, 0.1], [0.2, 0.8]]), jnp.array([[0.7, 0.0], [0.0, 0.3]])
        >>> jax.jit(select_patches, static_argnames=("top", "count"))(activation, confidence, top=1, count=2).tolist()
        [3, 0]

    Source:
        Tran et al., arXiv 2503.18267, class-informative data initialisation.
    """
    if activation.ndim != 2 or confidence.shape != activation.shape:
        raise ValueError(f"activation and confidence must be [N, P], got {activation.shape} and {confidence.shape}")
    images, crops = activation.shape
    if where is not None and where.shape != (images,):
        raise ValueError(f"where has shape {where.shape}, expected {(images,)}")
    if not 1 <= top <= crops:
        raise ValueError(f"top={top} must be between 1 and P={crops}")
    if not 1 <= count <= images * top:
        raise ValueError(f"count={count} must be between 1 and N top={images * top}")

    def choose(activation, confidence, keep):
        _, crop = jax.lax.top_k(jnp.where(keep[:, None], activation, 0.0), top)
        sure = jnp.where(keep[:, None], jnp.take_along_axis(confidence, crop, axis=1), jnp.inf).reshape(-1)
        flat = (jnp.arange(images)[:, None] * crops + crop).reshape(-1).astype(jnp.int32)
        order = jnp.argsort(sure, stable=True)[:count]
        return jnp.where(jnp.isfinite(sure[order]), flat[order], -1)

    keep = jnp.ones(images, bool) if where is None else where
    return rows_mixed(choose)(jax.lax.stop_gradient(activation), jax.lax.stop_gradient(confidence), keep)


def compose_grid(patches: Array, *, side: int = 2) -> Array:
    """Returns images made of `side x side` patches, row by row.

    Args:
        patches: float [N side^2, h, w, channels].
        side: patches along an edge (1 for small images).

    Returns:
        [N, side h, side w, channels] in the dtype of `patches`.

    Raises:
        ValueError: the number of patches is not divisible by `side^2`.

    Example:
        >>> compose_grid(jnp.arange(4.0).reshape(4, 1, 1, 1))[0, :, :, 0].tolist()
        [[0.0, 1.0], [2.0, 3.0]]

    Source:
        Sun et al., RDED, arXiv 2312.03526, whose grids NRR-DD starts from.
    """
    if side < 1 or patches.ndim != 4 or patches.shape[0] % (side * side):
        raise ValueError(f"patches must be [N side^2, h, w, channels] with side={side}, got {patches.shape}")
    _, h, w, c = patches.shape
    grid = patches.reshape(-1, side, side, h, w, c)
    return jnp.moveaxis(grid, 3, 2).reshape(-1, side * h, side * w, c)


def cutmix(key: Array, x: Array, other: Array, *, share: float | Array | None = None) -> tuple[Array, Array]:
    """Returns images with a box of others in them, and the share of the area that is their own.

    A box of sides `sqrt(1 - share)` of the image's around a random centre, cut at the border; one box for the batch.

    Args:
        key: draws the centre, and the share.
        x: float [N, H, W, channels].
        other: like `x`.
        share: in [0, 1], wanted area of `x`; None draws it uniformly.

    Returns:
        The mixed images, and the share float32 [] that the box cut at the border leaves.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> mixed, share = jax.jit(cutmix)(jax.random.key(0), jnp.ones((1, 8, 8, 1)), jnp.zeros((1, 8, 8, 1)))
        >>> bool(mixed.mean() == share)
        True

    Source:
        Yun et al., CutMix, arXiv 1905.04899, algorithm 1.
    """
    if x.ndim != 4 or x.shape != other.shape:
        raise ValueError(f"x and other must both be [N, H, W, channels], got {x.shape} and {other.shape}")
    draws = jax.random.uniform(key, (3,))
    side = jnp.sqrt(1 - jnp.asarray(draws[2] if share is None else share, jnp.float32))
    inside = []
    for axis, size in enumerate(x.shape[1:3]):
        half, centre = jnp.floor(side * size) / 2, jnp.floor(draws[axis] * size)
        pixel = jnp.arange(size)
        inside.append((pixel >= jnp.floor(centre - half)) & (pixel < jnp.floor(centre + half)))
    box = inside[0][:, None] & inside[1][None, :]
    return jnp.where(box[None, :, :, None], other, x), 1 - jnp.mean(box, dtype=jnp.float32)
