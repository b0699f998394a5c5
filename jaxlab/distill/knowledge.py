"""Distilling the Knowledge in a Neural Network (2015, arXiv 1503.02531), and matching features: what the family shares.

A student fits the teacher's softened predictions and the labels, or the teacher's features through a projection.

    soft + hard:  w T^2 KL(softmax(t / T) || softmax(s / T)) + (1 - w) CE(y, softmax(s))
    features:     |P s - t|^2 / D,   |P s / |P s| - t / |t||^2   or   1 - cos(P s, t)

The factor T^2 keeps the size of the gradient when T changes. Reconstructed: examples without a label count in the soft
term alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.mutual import consistency_loss
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms


def distillation_loss(
    logits: Array,
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    temperature: float = 4.0,
    soft_weight: float = 0.9,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the loss of fitting a teacher's softened predictions and the labels.

    `w T^2 mean KL(softmax(t / T) || softmax(s / T)) + (1 - w) mean CE(y, softmax(s))`.

    Args:
        logits: float [N, C], the student's.
        teacher_logits: float [N, C]; no gradient reaches them.
        labels: int [N], -1 = unlabelled; None leaves the soft term times `soft_weight`.
        temperature: T > 0.
        soft_weight: w in [0, 1].
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); a term without examples is 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> z = jnp.array([[2.0, 0.0]])
        >>> float(distillation_loss(z, z))
        0.0
        >>> round(float(distillation_loss(z, z, jnp.array([0]), soft_weight=0.5)), 4)
        0.0635

    Source:
        Hinton, Vinyals, Dean, arXiv 1503.02531. T = 4 and w = 0.9 are what comparisons of distillation methods use.
    """
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight={soft_weight} must be between 0 and 1")
    if labels is not None and labels.shape != logits.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {logits.shape[:1]}")
    options = {"where": where, "axis_name": axis_name}
    soft = consistency_loss(logits, teacher_logits, kind="kl", temperature=temperature, **options)
    if labels is None:
        return soft_weight * soft
    labels = jnp.asarray(labels)
    labelled = labels >= 0 if where is None else where & (labels >= 0)
    log_p = jax.nn.log_softmax(zero_where_false(logits, where).astype(compute_dtype(logits)))
    terms = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    hard = reduce_terms(terms, labelled, axis_name=axis_name)
    return soft_weight * soft + (1 - soft_weight) * hard


def feature_loss(
    features: Array,
    teacher_features: Array,
    *,
    projection: Array | None = None,
    kind: str = "mse",
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far a student's features, projected, are from its teacher's.

    With s the projected features: `mse`: `|s - t|^2 / E`; `unit`: `|s / |s| - t / |t||^2`; `cosine`: `1 - cos(s, t)`.

    Args:
        features: float [..., D], the student's.
        teacher_features: float [..., E]; no gradient reaches them.
        projection: float [D, E]; None needs D = E.
        kind: "mse", "unit" or "cosine".
        where: bool [...], features that exist.
        axis_name: mapped axis over which the first dim is spread.
        reduction: "mean" (over all shards) or "none", `[...]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), 0 without any feature; or `[...]` in the dtype of
        `features`. A zero vector has cosine 0 with everything.

    Raises:
        ValueError: shapes do not fit, or an option is unknown.

    Example:
        >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 0.0]])
        >>> float(feature_loss(s, t, projection=jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), kind="cosine"))
        0.0

    Source:
        Romero et al., FitNets, arXiv 1412.6550 (mse); Sun et al., Patient Knowledge Distillation, arXiv 1908.09355
        (unit).
    """
    if kind not in ("mse", "unit", "cosine"):
        raise ValueError(f"kind={kind!r} must be 'mse', 'unit' or 'cosine'")
    if features.ndim < 1 or features.shape[:-1] != teacher_features.shape[:-1]:
        raise ValueError(
            f"features and teacher_features differ in leading dims: {features.shape} and {teacher_features.shape}"
        )
    expected = (features.shape[-1], teacher_features.shape[-1])
    if projection is None and expected[0] != expected[1]:
        raise ValueError(f"features have {expected[0]} and {expected[1]} dims: pass projection={list(expected)}")
    if projection is not None and projection.shape != expected:
        raise ValueError(f"projection has shape {projection.shape}, expected {expected}")
    if where is not None and where.shape != features.shape[:-1]:
        raise ValueError(f"where has shape {where.shape}, expected {features.shape[:-1]}")
    dtype = compute_dtype(features, teacher_features)
    s = zero_where_false(features, where).astype(dtype)
    t = zero_where_false(jax.lax.stop_gradient(teacher_features), where).astype(dtype)
    if projection is not None:
        s = jnp.matmul(s, projection.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    if kind == "mse":
        terms = jnp.mean(jnp.square(s - t), axis=-1)
    else:
        s, t = safe_normalize(s), safe_normalize(t)
        terms = jnp.sum(jnp.square(s - t), axis=-1) if kind == "unit" else 1 - jnp.sum(s * t, axis=-1)
    return reduce_terms(terms, where, reduction=reduction, axis_name=axis_name, dtype=features.dtype)
