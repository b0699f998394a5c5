"""Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual Information.

MCMI, 2024, arXiv 2401.08732. A better teacher: a trained one is fine-tuned so that its predictions stay right and
spread out within each class. What they say beyond the class is what a student learns from, most of all about classes it
sees little of.

    Q_y  = mean of P_x over the examples of class y                           (P_x = softmax(f(x)))
    CMI  = I(X; prediction | Y) = mean_i KL(P_{x_i} || Q_{y_i}) >= 0
    loss = mean_i CE(y_i, P_{x_i}) - weight CMI,   Q constant

Q-step and step of the network alternate: the class mean is the argmin over Q of the mean divergence, so the estimate is
exact after it. The official code computes Q once before fine-tuning (or lets it run along with `update_centroids`);
renew it each epoch with `class_centroids`. Distil with `distillation_loss`.

Reconstructed: the default weight 0.2 (the runs state theirs on the command line); classes without an example.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, global_mean
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def mcmi_loss(
    logits: Array,
    labels: Array,
    centroids: Array,
    *,
    weight: float = 0.2,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the loss of a teacher that is to be right and to say much within each class.

    `mean CE(y, softmax(z)) - weight mean KL(softmax(z) || Q_y)`, with Q constant.

    Args:
        logits: float [N, C].
        labels: int [N]; -1 = unlabelled, no term.
        centroids: float [C, C], see `class_centroids`; no gradient reaches them.
        weight: >= 0; the divergence is bounded by -log of the smallest entry of Q, so keep it small.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); 0 without any example.

    Raises:
        ValueError: shapes do not fit or `weight` is negative.

    Example:
        >>> z, y, q = jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.full((2, 2), 0.5)
        >>> loss = jax.jit(mcmi_loss, static_argnames="weight")
        >>> bool(loss(z, y, q) < loss(z, y, q, weight=0.0))
        True

    Source:
        Ye, Hamidi, Tan, Yang, arXiv 2401.08732, eq. 12; code iclr2024mcmi/ICLRMCMI.
    """
    if not weight >= 0:
        raise ValueError(f"weight={weight} must not be negative")
    spread = conditional_mutual_information(logits, labels, centroids=centroids, where=where, axis_name=axis_name)
    keep = labels >= 0 if where is None else where & (labels >= 0)
    log_p = jax.nn.log_softmax(zero_where_false(logits, keep).astype(compute_dtype(logits)))
    own = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return global_mean(-own, keep, axis_name=axis_name) - weight * spread


def conditional_mutual_information(
    logits: Array,
    labels: Array,
    *,
    centroids: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how much the predictions tell about the example beyond its class, in nats.

    `mean_i KL(softmax(z_i) || Q_{y_i})`; with Q the class means of these examples it is exact and smallest.

    Args:
        logits: float [N, C].
        labels: int [N], in 0 .. C - 1; -1 = unlabelled, no term.
        centroids: float [C, C], Q; None = the class means of these examples. Constant either way (at the class means,
            where the divergence is smallest, its derivative by Q is 0 anyway).
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `logits`; 0 without any
        example.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> z = jnp.array([[9.0, 0.0], [0.0, 9.0], [3.0, 3.0]])
        >>> information = jax.jit(conditional_mutual_information)
        >>> bool(information(z, jnp.array([0, 1, 1])) < information(z, jnp.array([0, 0, 1])))
        True

    Source:
        Ye, Hamidi, Tan, Yang, arXiv 2401.08732, eq. 9; code iclr2024mcmi/ICLRMCMI (Q is cut at 1e-8).
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits and labels must be [N, C] and [N], got {logits.shape} and {labels.shape}")
    classes = logits.shape[1]
    if centroids is not None and centroids.shape != (classes, classes):
        raise ValueError(f"centroids has shape {centroids.shape}, expected {(classes, classes)}")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    labels = jnp.asarray(labels)
    keep = labels >= 0 if where is None else where & (labels >= 0)
    log_p = jax.nn.log_softmax(zero_where_false(logits, keep).astype(compute_dtype(logits)))
    p = jnp.exp(log_p)
    if centroids is None:
        centroids = class_centroids(p, labels, num_classes=classes, where=keep, axis_name=axis_name)
    q = jnp.maximum(jax.lax.stop_gradient(centroids).astype(p.dtype), 1e-8)
    terms = rows_mixed(lambda p, log_p, q, y: jnp.sum(p * (log_p - jnp.log(q)[y]), axis=-1))(
        p, log_p, q, jnp.maximum(labels, 0)
    )
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def class_centroids(
    probs: Array,
    labels: Array,
    *,
    num_classes: int,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the mean prediction for each class.

    `Q_y = mean of probs over the examples of class y`; a class without an example gets the uniform distribution.

    Args:
        probs: float [N, C], predictions for the training set.
        labels: int [N]; -1 = unlabelled.
        num_classes: rows of the result.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        float [num_classes, C] in the dtype of `probs`, without gradient.

    Raises:
        ValueError: shapes do not fit or `num_classes` is below 1.

    Example:
        >>> centroids = jax.jit(class_centroids, static_argnames="num_classes")
        >>> centroids(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0]), num_classes=2).tolist()
        [[0.5, 0.5], [0.5, 0.5]]

    Source:
        Ye, Hamidi, Tan, Yang, arXiv 2401.08732, section 4; code iclr2024mcmi/ICLRMCMI.
    """
    total, count = _class_sums(probs, labels, num_classes, where, axis_name)
    mean = jnp.where(count > 0, safe_divide(total, count), 1 / probs.shape[1])
    return mean.astype(probs.dtype)


def update_centroids(
    centroids: Array,
    probs: Array,
    labels: Array,
    *,
    decay: float = 0.9999,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the centroids after one optimiser step of running along: the mean of the batch enters slowly.

    `Q_y <- decay Q_y + (1 - decay) mean of the batch's class y`, then divided by its sum; absent classes stay.

    Args:
        centroids: float [K, C].
        probs: float [N, C], predictions for the batch.
        labels: int [N]; -1 = unlabelled.
        decay: in [0, 1].
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Shape and dtype of `centroids`, without gradient.

    Raises:
        ValueError: shapes do not fit or `decay` is out of range.

    Example:
        >>> q = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> update = jax.jit(update_centroids, static_argnames="decay")
        >>> update(q, jnp.array([[0.0, 1.0]]), jnp.array([0]), decay=0.75).tolist()
        [[0.75, 0.25], [0.0, 1.0]]

    Source:
        Code iclr2024mcmi/ICLRMCMI (0.9999, with 8 examples of every class).
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must be between 0 and 1")
    if centroids.ndim != 2 or probs.ndim != 2 or centroids.shape[1] != probs.shape[1]:
        raise ValueError(f"centroids and probs must be [K, C] and [N, C], got {centroids.shape} and {probs.shape}")
    total, count = _class_sums(probs, labels, centroids.shape[0], where, axis_name)
    old = jax.lax.stop_gradient(centroids).astype(total.dtype)
    new = jnp.where(count > 0, decay * old + (1 - decay) * safe_divide(total, count), old)
    return safe_divide(new, jnp.sum(new, axis=-1, keepdims=True)).astype(centroids.dtype)


def few_shot_subset(key: Array, labels: Array, *, fraction: float, num_classes: int) -> Array:
    """Returns which examples a student with few examples sees: the same share of every class, at random.

    Args:
        key: draws the examples.
        labels: int [N]; -1 = unlabelled, never chosen.
        fraction: in [0, 1]; of a class with n examples `ceil(fraction n)` are kept.
        num_classes: C.

    Returns:
        bool [N].

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> half = jax.jit(lambda key, labels: few_shot_subset(key, labels, fraction=0.5, num_classes=2))
        >>> keep = jax.device_get(half(jax.random.key(0), jnp.array([0, 0, 0, 0, 1, 1])))
        >>> int(keep[:4].sum()), int(keep[4:].sum())
        (2, 1)

    Source:
        Ye, Hamidi, Tan, Yang, arXiv 2401.08732, section 5.2 (5 to 75% of the examples of each class).
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must be between 0 and 1")
    if labels.ndim != 1 or num_classes < 1:
        raise ValueError(f"labels must be [N] and num_classes at least 1, got {labels.shape} and {num_classes}")

    def choose(key, labels):
        draw = jax.random.uniform(key, labels.shape)
        same = labels[:, None] == labels[None, :]
        before = (draw[None, :] < draw[:, None]) | ((draw[None] == draw[:, None]) & _earlier(len(labels)))
        rank, count = jnp.sum(same & before, axis=1), jnp.sum(same, axis=1)
        # Rounded up from a hair below, so that 0.1 of 10 is 1 in any precision.
        quota = jnp.ceil(fraction * count - 1e-4)
        return (labels >= 0) & (labels < num_classes) & (rank < quota)

    return rows_mixed(choose)(key, jnp.asarray(labels))


def _class_sums(probs, labels, num_classes, where, axis_name):
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(f"probs and labels must be [N, C] and [N], got {probs.shape} and {labels.shape}")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    keep = labels >= 0 if where is None else where & (labels >= 0)

    def sums(probs, labels, keep):
        p = zero_where_false(jax.lax.stop_gradient(probs), keep).astype(compute_dtype(probs))
        member = jax.nn.one_hot(jnp.where(keep, labels, -1), num_classes, dtype=p.dtype)
        return jnp.matmul(member.T, p, precision=jax.lax.Precision.HIGHEST), jnp.sum(member, axis=0)[:, None]

    total, count = rows_mixed(sums)(probs, jnp.asarray(labels), keep)
    return all_sum(total, axis_name), all_sum(count, axis_name)


def _earlier(size: int) -> Array:
    return jnp.arange(size)[None, :] < jnp.arange(size)[:, None]
