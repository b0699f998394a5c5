"""Class-relation Knowledge Distillation for Novel Class Discovery (2023, arXiv 2307.09158).

Unlabelled examples of new classes are sorted into classes with the help of labelled examples of known ones. How an
example of a new class resembles the known classes, its class relation, is told by the network that was trained on these
alone; training to discover would lose it, so it is kept by distillation, the more the nearer an example is to them.

    o: logits of the frozen network for the known classes; n: all logits; both divided by tau T
    r = softmax(o),   w = sum_{c known} softmax(n)_c,   w <- w / mean(w)
    L_rKD = T^2 mean over new examples of  -w sum_{c known} r_c log softmax(n_known)_c
    L = L_swap + 0.1 L_rKD

The gradient flows through w: the weight is learnt. L_swap is the swapped prediction of UNO: each view has to predict
the other's targets, which are labels for labelled examples and equipartitioned pseudo-labels (Sinkhorn) for the others.
The logits are cosines to prototypes of length 1 (`normalize_prototypes`).

Reconstructed: masks and batches without new examples.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, axis_index, gather_rows
from jaxlab.ops.masked import compute_dtype, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.transport import sinkhorn


def class_relation_loss(
    logits: Array,
    known_logits: Array,
    *,
    temperature: float = 4.0,
    tau: float = 0.1,
    learn_weight: bool = True,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far the relations of new examples to the known classes are from those the frozen network saw.

    `T^2 mean_i -w_i sum_{c <= K} r_ic log softmax(n_i,known)_c`, see the module's docstring.

    Args:
        logits: float [N, C], the student's for all classes, the K known ones first.
        known_logits: float [N, K], the frozen network's; no gradient reaches them.
        temperature: T > 0.
        tau: > 0, by which cosines are divided everywhere.
        learn_weight: whether the gradient flows through w; False makes it a constant.
        where: bool [N], examples of new classes (labelled ones take no part).
        axis_name: mapped axis over which the examples are spread, for the mean of w and of the loss.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `logits`; 0 without a
        new example.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> z = jnp.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]])
        >>> loss = jax.jit(class_relation_loss)
        >>> float(loss(z, z[:, :2])) < float(loss(z, z[::-1, :2]))
        True

    Source:
        Gu et al., arXiv 2307.09158, section 3.3; code kleinzcy/Cr-KD-NCD (tau 0.1, T 4).
    """
    if logits.ndim != 2 or known_logits.ndim != 2 or known_logits.shape[0] != logits.shape[0]:
        raise ValueError(f"logits and known_logits must be [N, C] and [N, K], got {logits.shape}, {known_logits.shape}")
    known = known_logits.shape[1]
    if not 1 <= known <= logits.shape[1]:
        raise ValueError(f"known_logits has K={known} classes, expected 1 to the C={logits.shape[1]} of logits")
    for name, value in (("temperature", temperature), ("tau", tau)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    if where is not None and where.shape != logits.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {logits.shape[:1]}")
    dtype = compute_dtype(logits, known_logits)
    keep = jnp.ones(len(logits), bool) if where is None else where
    n = zero_where_false(logits, keep).astype(dtype) / (tau * temperature)
    o = zero_where_false(jax.lax.stop_gradient(known_logits), keep).astype(dtype) / (tau * temperature)
    log_student = jax.nn.log_softmax(n[:, :known])
    weight = jnp.sum(jax.nn.softmax(n)[:, :known], axis=-1)
    weight = weight if learn_weight else jax.lax.stop_gradient(weight)
    total = all_sum(jnp.sum(jnp.where(keep, weight, 0.0)), axis_name)
    count = all_sum(jnp.sum(keep, dtype=dtype), axis_name)
    # Where no example resembles a known class, every weight underflows: nothing is to be kept.
    share = safe_divide(weight * count, total)
    terms = -(temperature**2) * share * jnp.sum(jax.nn.softmax(o) * log_student, axis=-1)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def discovery_targets(
    novel_logits: Array,
    labels: Array,
    *,
    num_known: int,
    epsilon: float = 0.05,
    iterations: int = 3,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns what the other view has to predict: labels, and pseudo-labels that use all new classes equally.

    Labelled rows: one-hot among the known classes. The others: `Q = exp(novel_logits / epsilon)`, whose columns (new
    classes) and rows are normalised in turn, rows last, so that a row sums to 1.

    Args:
        novel_logits: float [N, U], cosines to the prototypes of the new classes.
        labels: int [N], 0 .. num_known - 1; -1 = unlabelled, of a new class.
        num_known: K.
        epsilon: > 0, smoothness of the pseudo-labels.
        iterations: >= 1.
        where: bool [N], real examples; the others are 0.
        axis_name: mapped axis over which the examples are spread; the equipartition is over all of them.

    Returns:
        float [N, K + U] in the dtype of `novel_logits`, constants.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> z = jnp.array([[0.9, 0.0], [0.8, 0.1], [0.0, 0.0]])
        >>> targets = jax.jit(discovery_targets, static_argnames="num_known")
        >>> targets(z, jnp.array([-1, -1, 1]), num_known=2).round().tolist()
        [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]

    Source:
        Fini et al., UNO, arXiv 2108.08536; code kleinzcy/Cr-KD-NCD (epsilon 0.05, 3 iterations), in the log domain.
    """
    if novel_logits.ndim != 2 or labels.shape != novel_logits.shape[:1]:
        raise ValueError(f"novel_logits and labels must be [N, U] and [N], got {novel_logits.shape}, {labels.shape}")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    if num_known < 1 or iterations < 1:
        raise ValueError(f"num_known={num_known} and iterations={iterations} must be at least 1")
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive")
    labels = jnp.asarray(labels)
    real = jnp.ones(labels.shape, bool) if where is None else where
    run = rows_mixed(_assign)
    novel = run(
        jax.lax.stop_gradient(novel_logits),
        real & (labels < 0),
        epsilon=epsilon,
        iterations=iterations,
        axis_name=axis_name,
    )
    known = jax.nn.one_hot(jnp.where(real, labels, -1), num_known, dtype=novel.dtype)
    return jnp.concatenate([known, novel], axis=-1)


def swapped_prediction_loss(
    logits: Array,
    targets: Array,
    *,
    tau: float = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the cross entropy of every view with the targets of every other view that has some.

    `mean_{v < V'} mean_{w != v} -sum_c targets_vc log softmax(logits_w / tau)_c`.

    Args:
        logits: float [V, N, C], V >= 2 views.
        targets: float [V', N, C], of the first V' views (full crops); no gradient reaches them.
        tau: > 0.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `logits`; 0 without any
        example.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> t = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])
        >>> round(float(jax.jit(swapped_prediction_loss)(t, t)), 5)
        5e-05

    Source:
        Fini et al., UNO, arXiv 2108.08536; code kleinzcy/Cr-KD-NCD.
    """
    if logits.ndim != 3 or logits.shape[0] < 2:
        raise ValueError(f"logits must be [V, N, C] with V >= 2 views, got {logits.shape}")
    if targets.ndim != 3 or targets.shape[1:] != logits.shape[1:] or not 1 <= targets.shape[0] <= logits.shape[0]:
        raise ValueError(f"targets must be [V' <= {logits.shape[0]}, {logits.shape[1]}, {logits.shape[2]}], got "
                         f"{targets.shape}")  # fmt: skip
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive")
    if where is not None and where.shape != logits.shape[1:2]:
        raise ValueError(f"where has shape {where.shape}, expected {logits.shape[1:2]}")
    dtype = compute_dtype(logits, targets)
    keep = jnp.ones(logits.shape[1], bool) if where is None else where
    clean = lambda x: jnp.where(keep[None, :, None], x, jnp.zeros((), x.dtype)).astype(dtype)
    log_p = jax.nn.log_softmax(clean(logits) / tau)
    views, full = logits.shape[0], targets.shape[0]
    others = (jnp.arange(full)[:, None] != jnp.arange(views)[None, :]).astype(dtype) / (full * (views - 1))
    terms = -jnp.einsum("vw,vnc,wnc->n", others, clean(jax.lax.stop_gradient(targets)), log_p,
                        precision=jax.lax.Precision.HIGHEST)  # fmt: skip
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def normalize_prototypes(prototypes: Array) -> Array:
    """Returns prototypes of length 1, as which they enter every step.

    `w_c / |w_c|`; a zero vector stays zero.

    Args:
        prototypes: float [..., D, C], one column for each class.

    Returns:
        Shape and dtype of `prototypes`.

    Raises:
        ValueError: `prototypes` has fewer than two axes.

    Example:
        >>> jax.jit(normalize_prototypes)(jnp.array([[3.0, 0.0], [0.0, 0.0]])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]

    Source:
        Code kleinzcy/Cr-KD-NCD: once before every optimiser step, without gradient.
    """
    if prototypes.ndim < 2:
        raise ValueError(f"prototypes must be [..., D, C], got {prototypes.shape}")
    return safe_normalize(prototypes, axis=-2)


def _assign(logits, keep, *, epsilon, iterations, axis_name):
    """Returns equipartitioned rows [N, U], 0 where not kept; classes are normalised first, examples last."""
    everyone, real = (gather_rows(x, axis_name) for x in (zero_where_false(logits, keep), keep))
    cost = -everyone.astype(compute_dtype(logits)).T
    plan = sinkhorn(cost, epsilon=epsilon, iterations=iterations, kv_where=real).T
    plan = plan * jnp.sum(real, dtype=plan.dtype)
    own = axis_index(axis_name) * len(keep)
    return jax.lax.dynamic_slice_in_dim(plan, own, len(keep)).astype(logits.dtype)
