"""SIRL: Similarity-based Implicit Representation Learning (2023, arXiv 2301.00810).

People are asked which two of three behaviours are most alike. A representation that learns from the answers keeps what
matters to them and drops what does not; rewards learnt on top of it from preferences then need few questions.

    answer (P1, P2 alike, N odd):   loss = T(P1, P2, N) + T(P2, P1, N)
    T(A, P, N) = max(0, |phi(A) - phi(P)|^2 - |phi(A) - phi(N)|^2 + margin),   margin 1, phi not normalised
    reward on top:  r = w . phi (or a small network),   P(a over b) = sigmoid(r_a - r_b)

The simulated person takes the nearest two in the true features. Two numbers judge a representation: how well linear
regression finds the true features in it, and how many preferences the learnt reward orders rightly.

Reconstructed: unanswered queries and masks; the ridge of the regression, which is there for its arithmetic only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def similarity_query_loss(
    embeddings: Array,
    odd: Array,
    *,
    margin: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the loss of answers to "which two of these three are most alike?", each of the two as anchor once.

    Args:
        embeddings: float [B, 3, D], of the three behaviours of each query; not normalised here.
        odd: int [B], which of the three is the one that is left over (`odd_one_out` for a simulated person); -1 =
            unanswered, no term.
        margin: >= 0; it alone fixes the scale of the embeddings.
        where: bool [B], real queries.
        axis_name: mapped axis over which the queries are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `embeddings`; no answer
        gives 0.

    Raises:
        ValueError: shapes do not fit or `margin` is negative.

    Example:
        >>> phi, loss = jnp.array([[[0.0], [0.5], [2.0]]]), jax.jit(similarity_query_loss)
        >>> float(loss(phi, jnp.array([2]))), float(loss(phi, jnp.array([0])))
        (0.0, 3.0)

    Source:
        Bobu et al., arXiv 2301.00810, section 4 (both orders of the pair).
    """
    if embeddings.ndim != 3 or embeddings.shape[1] != 3 or odd.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings and odd must be [B, 3, D] and [B], got {embeddings.shape} and {odd.shape}")
    keep = checked_where(where, embeddings.shape[0]) & (odd >= 0)
    # The two that are alike follow the odd one, round the circle of three.
    order = (jnp.maximum(odd, 0)[:, None] + jnp.arange(3)[None, :]) % 3
    chosen = jax.nn.one_hot(order, 3, dtype=compute_dtype(embeddings))
    wide = zero_where_false(embeddings, keep).astype(chosen.dtype)
    ordered = jnp.einsum("bij,bjd->bid", chosen, wide, precision=jax.lax.Precision.HIGHEST)
    other, first, second = ordered[:, 0], ordered[:, 1], ordered[:, 2]
    terms = _triplet_terms(first, second, other, margin) + _triplet_terms(second, first, other, margin)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=embeddings.dtype)


def euclidean_triplet_loss(
    anchor: Array,
    positive: Array,
    negative: Array,
    *,
    margin: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the triplet loss in squared Euclidean distances: `max(0, |A - P|^2 - |A - N|^2 + margin)`.

    Args:
        anchor: float [B, D]; not normalised here.
        positive: float [B, D].
        negative: float [B, D].
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
        >>> a, p, n = jnp.array([[0.0]]), jnp.array([[1.0]]), jnp.array([[0.5]])
        >>> float(jax.jit(euclidean_triplet_loss)(a, p, n))
        1.75

    Source:
        Bobu et al., arXiv 2301.00810, section 4.
    """
    if anchor.ndim != 2 or positive.shape != anchor.shape or negative.shape != anchor.shape:
        raise ValueError(
            "anchor, positive and negative must have one shape [B, D], "
            f"got {anchor.shape}, {positive.shape} and {negative.shape}"
        )
    keep = checked_where(where, anchor.shape[0])
    dtype = compute_dtype(anchor, positive, negative)
    arrays = (zero_where_false(x, keep).astype(dtype) for x in (anchor, positive, negative))
    terms = _triplet_terms(*arrays, margin)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=anchor.dtype)


def preference_loss(
    reward_a: Array,
    reward_b: Array,
    labels: Array,
    *,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the cross-entropy of preferences under Bradley and Terry's model: `P(a over b) = sigmoid(r_a - r_b)`.

    Args:
        reward_a: float [B].
        reward_b: float [B].
        labels: int [B], 1 = a is preferred, 0 = b, -1 = unanswered, no term.
        where: bool [B], real queries.
        axis_name: mapped axis over which the queries are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `reward_a`; no answer
        gives 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> loss = jax.jit(preference_loss)
        >>> round(float(loss(jnp.zeros(1), jnp.zeros(1), jnp.ones(1, int))), 4)  # log 2
        0.6931

    Source:
        Bradley, Terry (1952), as in Bobu et al., arXiv 2301.00810, section 4.
    """
    if reward_a.ndim != 1 or reward_b.shape != reward_a.shape or labels.shape != reward_a.shape:
        raise ValueError(
            f"reward_a, reward_b and labels must have one shape [B], got {reward_a.shape}, {reward_b.shape} and "
            f"{labels.shape}"
        )
    keep = checked_where(where, reward_a.shape[0]) & (labels >= 0)
    dtype = compute_dtype(reward_a, reward_b)
    a, b = (zero_where_false(x, keep).astype(dtype) for x in (reward_a, reward_b))
    terms = jax.nn.softplus(jnp.where(labels > 0, b - a, a - b))
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=reward_a.dtype)


def odd_one_out(features: Array) -> Array:
    """Returns what a person who sees these features would answer: which of three the other two are nearest without.

    Args:
        features: float [B, 3, K], the features that matter, on one scale.

    Returns:
        int32 [B]: the index outside the nearest pair, the lowest on a tie. No gradient.

    Raises:
        ValueError: `features` is not [B, 3, K].

    Example:
        >>> odd_one_out(jnp.array([[[0.0], [2.0], [0.1]]])).tolist()
        [1]

    Source:
        Bobu et al., arXiv 2301.00810, section 5 (the simulated person).
    """
    if features.ndim != 3 or features.shape[1] != 3:
        raise ValueError(f"features must be [B, 3, K], got {features.shape}")
    wide = jax.lax.stop_gradient(features).astype(compute_dtype(features))
    # Without i, those that remain are i + 1 and i + 2, round the circle of three.
    gap = jnp.sum(jnp.square(jnp.roll(wide, -1, axis=1) - jnp.roll(wide, -2, axis=1)), axis=2)
    return jnp.argmin(gap, axis=1).astype(jnp.int32)


def feature_prediction_error(
    embeddings: Array, features: Array, test_embeddings: Array, test_features: Array, *, ridge: float = 1e-6
) -> Array:
    """Returns how badly linear regression predicts the true features from embeddings, on a test set.

    `mean |(A phi + b) - psi|^2 / variance`, A and b fitted on the first set, variances of that set's features: 0 if the
    features lie in the embeddings, about 1 if nothing of them does.

    Args:
        embeddings: float [N, D].
        features: float [N, K].
        test_embeddings: float [M, D].
        test_features: float [M, K].
        ridge: > 0, as a share of the mean variance of the embeddings.

    Returns:
        Scalar in the accumulation dtype, without gradient; a feature that does not vary counts by its plain error.

    Raises:
        ValueError: shapes do not fit or `ridge` is not positive.

    Example:
        >>> psi = jnp.array([[0.0], [1.0], [2.0]])
        >>> error = jax.jit(feature_prediction_error)
        >>> float(error(3 * psi + 1, psi, 3 * psi + 1, psi)) < 1e-6
        True

    Source:
        Bobu et al., arXiv 2301.00810, section 5. Reconstructed: the ridge, and variances as the scale.
    """
    shapes = [x.shape for x in (embeddings, features, test_embeddings, test_features)]
    (n, d), (n_features, k) = (shape if len(shape) == 2 else (-1, -1) for shape in shapes[:2])
    if n < 1 or n_features != n or shapes[2][1:] != (d,) or shapes[3][1:] != (k,) or shapes[2][0] != shapes[3][0]:
        raise ValueError(
            "embeddings, features, test_embeddings and test_features must be [N, D], [N, K], [M, D] and [M, K], "
            f"got {', '.join(map(str, shapes))}"
        )
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be positive")
    arrays = jax.lax.stop_gradient((embeddings, features, test_embeddings, test_features))
    dtype = compute_dtype(*arrays)
    return rows_mixed(_prediction_error)(*(x.astype(dtype) for x in arrays), ridge=ridge)


def preference_accuracy(rewards: Array, true_rewards: Array, pairs: Array, *, where: Array | None = None) -> Array:
    """Returns the share of pairs that rewards order as the true ones do; an undecided pair counts a half.

    Args:
        rewards: float [N], learnt.
        true_rewards: float [N]; pairs that are equal in it do not count.
        pairs: int [P, 2], rows to compare.
        where: bool [P], real pairs.

    Returns:
        Scalar in the accumulation dtype, without gradient; 0 if no pair counts.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> pairs = jnp.array([[0, 1], [1, 2]])
        >>> float(preference_accuracy(jnp.array([0.0, 5.0, 1.0]), jnp.array([1.0, 2.0, 3.0]), pairs))
        0.5

    Source:
        Bobu et al., arXiv 2301.00810, section 5 (test preference accuracy).
    """
    if rewards.ndim != 1 or true_rewards.shape != rewards.shape or pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"rewards, true_rewards and pairs must be [N], [N] and [P, 2], got {rewards.shape}, {true_rewards.shape} "
            f"and {pairs.shape}"
        )
    keep = checked_where(where, pairs.shape[0])
    return rows_mixed(_order)(jax.lax.stop_gradient(rewards), jax.lax.stop_gradient(true_rewards), pairs, keep)


def _triplet_terms(anchor, positive, negative, margin):
    if margin < 0:
        raise ValueError(f"margin={margin} must not be negative")
    square = lambda x: jnp.sum(jnp.square(x), axis=-1)
    return jax.nn.relu(square(anchor - positive) - square(anchor - negative) + margin)


def _prediction_error(x, y, x_test, y_test, *, ridge):
    centre, mean = jnp.mean(x, axis=0, keepdims=True), jnp.mean(y, axis=0, keepdims=True)
    x, x_test, spread = x - centre, x_test - centre, jnp.mean(jnp.square(y - mean), axis=0, keepdims=True)
    # Embeddings at a scale of 1, so that no square of theirs overflows and the ridge is a share of the variance.
    scale = jnp.max(jnp.abs(x))
    x, x_test = safe_divide(x, scale), safe_divide(x_test, scale)
    product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    gram = product(x.T, x)
    share = ridge * jnp.trace(gram) / len(gram) + jnp.finfo(x.dtype).tiny
    weights = jnp.linalg.solve(gram + share * jnp.eye(len(gram), dtype=x.dtype), product(x.T, y - mean))
    error = jnp.square(product(x_test, weights) + mean - y_test)
    return jnp.mean(error / jnp.where(spread > 0, spread, 1.0))


def _order(rewards, true_rewards, pairs, keep):
    dtype = compute_dtype(rewards, true_rewards)
    found, truth = (
        jnp.sign(x.astype(dtype)[pairs[:, 0]] - x.astype(dtype)[pairs[:, 1]]) for x in (rewards, true_rewards)
    )
    return masked_mean((1 + found * truth) / 2, keep & (truth != 0))
