"""Light readers of frozen features: what a representation has kept is what a simple model can read from it.

`ridge_probe` is linear regression with a closed form; with one-hot targets it is a linear classifier, and with those of
several factors side by side it reads each of them. `logistic_probe` is logistic regression, the usual linear probe. The
vote of nearest neighbours is `ops.weighted_knn`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def ridge_probe(
    features: Array, targets: Array, query: Array, *, penalty: float = 1e-3, where: Array | None = None
) -> Array:
    """Returns what linear ridge regression from features to targets predicts for other rows.

    `argmin over W, b of mean_i ||t_i - W^T f_i - b||^2 + penalty ||W||^2`, with every feature standardised by the rows
    it is fitted to, so that `penalty` does not depend on their scale. Features are frozen: no gradient passes.

    Args:
        features: float [N, D].
        targets: float [N, K]; one-hot rows make the result scores of classes.
        query: float [M, D], rows to predict.
        penalty: > 0; towards 0 it is least squares.
        where: bool [N], real rows of `features`.

    Returns:
        float [M, K] in the dtype of `features`; 0 without any row.

    Raises:
        ValueError: shapes do not fit or `penalty` is not positive.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> round(float(ridge_probe(x, 3 * x, jnp.array([[4.0]]), penalty=1e-6)[0, 0]), 3)
        12.0
    """
    if features.ndim != 2 or query.ndim != 2 or query.shape[1] != features.shape[1]:
        raise ValueError(f"features and query must be [N, D] and [M, D], got {features.shape} and {query.shape}")
    if targets.ndim != 2 or targets.shape[0] != features.shape[0]:
        raise ValueError(f"targets must be [{features.shape[0]}, K], got {targets.shape}")
    if where is not None and where.shape != features.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {features.shape[:1]}")
    if not penalty > 0:
        raise ValueError(f"penalty={penalty} must be positive")
    keep = jnp.ones(features.shape[0], bool) if where is None else where
    frozen = jax.lax.stop_gradient((features, targets, query))
    return rows_mixed(_ridge)(*frozen, keep, penalty=float(penalty))


def logistic_probe(
    features: Array,
    labels: Array,
    query: Array,
    *,
    num_classes: int,
    penalty: float = 1e-3,
    steps: int = 200,
    learning_rate: float = 0.1,
    where: Array | None = None,
) -> Array:
    """Returns the class logits that logistic regression on the features gives to other rows.

    `mean_i CE(y_i, W^T f_i + b) + penalty ||W||^2 / 2`, with every feature standardised by the rows it is fitted to, by
    so many steps of Adam on all rows at once, from zero. Features are frozen: no gradient passes.

    Args:
        features: float [N, D].
        labels: int [N] in 0 .. C - 1; -1 = unlabelled, takes no part.
        query: float [M, D], rows to predict.
        num_classes: C.
        penalty: >= 0.
        steps: >= 1.
        learning_rate: > 0.
        where: bool [N], real rows of `features`.

    Returns:
        float [M, C] in the dtype of `features`; 0 without any row.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> x = jnp.array([[-1.0], [-2.0], [1.0], [2.0]])
        >>> fit = jax.jit(lambda x, q: logistic_probe(x, jnp.array([0, 0, 1, 1]), q, num_classes=2, steps=20))
        >>> jnp.argmax(fit(x, jnp.array([[-3.0], [3.0]])), axis=-1).tolist()
        [0, 1]
    """
    if features.ndim != 2 or query.ndim != 2 or query.shape[1] != features.shape[1]:
        raise ValueError(f"features and query must be [N, D] and [M, D], got {features.shape} and {query.shape}")
    for name, array in (("labels", labels), ("where", where)):
        if array is not None and array.shape != features.shape[:1]:
            raise ValueError(f"{name} has shape {array.shape}, expected {features.shape[:1]}")
    if not (penalty >= 0 and learning_rate > 0 and steps >= 1 and num_classes >= 1):
        raise ValueError(
            f"penalty={penalty}, learning_rate={learning_rate}, steps={steps} and num_classes={num_classes} must be "
            "at least 0, above 0, at least 1 and at least 1"
        )
    keep = labels >= 0 if where is None else where & (labels >= 0)
    frozen = jax.lax.stop_gradient((features, query))
    options = {"classes": num_classes, "penalty": float(penalty), "steps": steps, "rate": float(learning_rate)}
    return rows_mixed(_logistic)(*frozen, labels, keep, **options)


def _logistic(features, query, labels, keep, *, classes, penalty, steps, rate):
    wide = compute_dtype(features)
    x, q = _standardised(features.astype(wide), query.astype(wide), keep)
    labels = jnp.maximum(labels, 0)

    def loss(params):
        logits = jnp.matmul(x, params["w"], precision=jax.lax.Precision.HIGHEST) + params["b"][None]
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return masked_mean(terms, keep) + penalty * jnp.sum(jnp.square(params["w"])) / 2

    optimizer = optax.adam(rate)
    start = {"w": jnp.zeros((x.shape[1], classes), wide), "b": jnp.zeros(classes, wide)}

    def step(state, _):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, match_varying((start, optimizer.init(start)), x)[0], None, length=steps)
    logits = jnp.matmul(q, params["w"], precision=jax.lax.Precision.HIGHEST) + jnp.asarray(params["b"])[None]
    return logits.astype(features.dtype)


def _standardised(x, query, keep):
    """Returns rows and queries in units of the kept rows' deviations (0 for a constant feature), masked rows 0."""
    centre = masked_mean(x, keep, axis=0)
    x = zero_where_false(x - centre[None], keep)
    scale = jnp.sqrt(masked_mean(x * x, keep, axis=0))[None]
    return safe_divide(x, scale), safe_divide(query - centre[None], scale)


def _ridge(features, targets, query, keep, *, penalty):
    dtype, wide = features.dtype, compute_dtype(features)
    x, q = _standardised(features.astype(wide), query.astype(wide), keep)
    middle = masked_mean(targets.astype(wide), keep, axis=0)
    t = zero_where_false(targets.astype(wide) - middle[None], keep)
    count = jnp.maximum(jnp.sum(keep, dtype=wide), 1)
    product = lambda a, b: jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) / count
    gram = product(x, x) + penalty * jnp.eye(x.shape[1], dtype=wide)
    weights = jax.scipy.linalg.solve(gram, product(x, t), assume_a="pos")
    return (jnp.matmul(q, weights, precision=jax.lax.Precision.HIGHEST) + middle[None]).astype(dtype)
