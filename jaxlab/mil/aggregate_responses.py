"""Learning from Aggregate Responses: Instance Level versus Bag Level Loss Functions (2024, arXiv 2401.11081).

Of each bag only the mean response is known. Fit the mean prediction to it (bag loss), or every prediction (instance
loss); the second is the first plus a penalty on the spread of predictions inside a bag, and a weight between them
trades variance for bias.

    L_bag = mean_a l(y_a, mean_i f_i)      L_ins = mean_a mean_i l(y_a, f_i)      R = mean_a mean_i (f_i - mean_j f_j)^2
    L_rho = (1 - rho) L_bag + rho L_ins;   for the squared loss L_ins = L_bag + R, so L_rho = L_bag + rho R

With x ~ N(0, I) and bags of size k at random, the minimiser over linear f tends to theta / (1 + rho (k - 1)), and the
bag loss alone (least squares on m bags of d features) has risk sigma^2 d / (m - d - 1). Noise of scale 2 C / (k eps) on
means of responses clipped to [-C, C] makes them eps-differentially private in the labels.

Reconstructed: bags of unequal sizes (each bag counts once), the constants of the private mechanism, and the risk whose
minimum is the best bag size (first order in d / m). With the bag loss alone that size is always 1: the mechanism's
noise cancels against the number of bags, so privacy gains from larger bags only through the shrinkage of rho > 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.mil.models import at_least_one
from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed

_Loss = str | Callable[[Array, Array], Array]


def interpolated_loss(
    predictions: Array,
    responses: Array,
    *,
    rho: float | Array,
    loss: _Loss = "squared",
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns `(1 - rho) * bag loss + rho * instance loss`.

    Args:
        predictions: float [B, N], or [T] with `segment_ids`.
        responses: float [B], the mean response of each bag.
        rho: 0 is the bag loss, 1 the instance loss; larger values shrink the spread inside bags further.
        loss: "squared", or a function of (response, prediction), entry by entry.
        where: bool, like `predictions`, real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.
        axis_name: mapped axis over which whole bags are spread.
        reduction: "mean" over the bags of all shards, or "none", [B].

    Returns:
        Scalar in the accumulation dtype, or [B] in the dtype of `predictions`. An empty bag is no term.

    Raises:
        ValueError: shapes do not fit or an option is unknown.

    Example:
        >>> loss = jax.jit(lambda f, y: interpolated_loss(f, y, rho=0.5))
        >>> float(loss(jnp.array([[0.0, 2.0]]), jnp.array([1.0])))
        0.5

    Source:
        Javanmard et al., arXiv 2401.11081, eq. 4 (rho there weighs the same two losses).
    """
    bags = _checked(predictions, responses, where, segment_ids, num_segments)
    dtype = compute_dtype(predictions)

    def run(predictions, responses, bags, rho):
        bag, instance = _terms(predictions, responses, bags, loss)
        return (1 - rho) * bag + rho * instance, bags.count > 0

    terms, some = rows_mixed(run)(predictions, responses, bags, jnp.asarray(rho, dtype))
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=predictions.dtype)


def bag_loss(predictions: Array, responses: Array, **options) -> Array:
    """Returns the loss between each bag's response and its mean prediction, `mean_a l(y_a, mean_i f_i)`.

    Args:
        predictions: float [B, N], or [T] with `segment_ids`.
        responses: float [B], the mean response of each bag.
        **options: as of `interpolated_loss`, without `rho`.

    Returns:
        As `interpolated_loss`.

    Raises:
        ValueError: shapes do not fit or an option is unknown.

    Example:
        >>> float(jax.jit(bag_loss)(jnp.array([[0.0, 2.0]]), jnp.array([1.0])))
        0.0

    Source:
        Javanmard et al., arXiv 2401.11081, eq. 1.
    """
    return interpolated_loss(predictions, responses, rho=0.0, **options)


def instance_loss(predictions: Array, responses: Array, **options) -> Array:
    """Returns the loss between each bag's response and each of its predictions, `mean_a mean_i l(y_a, f_i)`.

    Args:
        predictions: float [B, N], or [T] with `segment_ids`.
        responses: float [B], the mean response of each bag.
        **options: as of `interpolated_loss`, without `rho`.

    Returns:
        As `interpolated_loss`.

    Raises:
        ValueError: shapes do not fit or an option is unknown.

    Example:
        >>> float(jax.jit(instance_loss)(jnp.array([[0.0, 2.0]]), jnp.array([1.0])))
        1.0

    Source:
        Javanmard et al., arXiv 2401.11081, eq. 2.
    """
    return interpolated_loss(predictions, responses, rho=1.0, **options)


def within_bag_variance(
    predictions: Array,
    *,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the spread of predictions inside bags, `mean_a mean_i (f_i - mean_j f_j)^2`.

    Args:
        predictions: float [B, N], or [T] with `segment_ids`.
        where: bool, like `predictions`, real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.
        axis_name: mapped axis over which whole bags are spread.
        reduction: "mean" over the bags of all shards, or "none", [B].

    Returns:
        Scalar in the accumulation dtype, or [B] in the dtype of `predictions`. An empty bag is no term.

    Raises:
        ValueError: shapes do not fit or an option is unknown.

    Example:
        >>> float(jax.jit(within_bag_variance)(jnp.array([[0.0, 2.0]])))
        1.0

    Source:
        Javanmard et al., arXiv 2401.11081, lemma 2.1.
    """
    bags = _bags_of(predictions, where, segment_ids, num_segments)

    def run(predictions, bags):
        wide = zero_where_false(predictions, bags.keep).astype(compute_dtype(predictions))
        return bags.mean(jnp.square(wide - bags.spread(bags.mean(wide)))), bags.count > 0

    terms, some = rows_mixed(run)(predictions, bags)
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=predictions.dtype)


def linear_interpolated_estimator(
    x: Array,
    responses: Array,
    *,
    rho: float | Array,
    ridge: float = 0.0,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
) -> Array:
    """Returns the linear model that minimises `interpolated_loss` plus `ridge * |theta|^2`, in closed form.

    `theta = (mean_a xbar_a xbar_a' + rho mean_a mean_i (x_i - xbar_a)(x_i - xbar_a)' + ridge I)^-1 mean_a xbar_a y_a`.

    Args:
        x: float [B, N, D], or [T, D] with `segment_ids`.
        responses: float [B], the mean response of each bag.
        rho: >= 0, see `interpolated_loss`.
        ridge: >= 0; with 0 and a singular matrix the solution of least norm is taken, which has no gradient there.
        where: bool [B, N] (or [T]), real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        [D] in the dtype of `x`; 0 without a bag.

    Raises:
        ValueError: shapes do not fit or `ridge` is negative.

    Example:
        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [2.0]]])
        >>> fit = jax.jit(lambda x, y: linear_interpolated_estimator(x, y, rho=0.0))
        >>> fit(x, jnp.array([4.0, 2.0])).round(3).tolist()
        [2.0]

    Source:
        Javanmard et al., arXiv 2401.11081, section 3 (normal equations; the ridge is an addition).
    """
    if ridge < 0:
        raise ValueError(f"ridge={ridge} must not be negative")
    bags = group(x, where, segment_ids, num_segments)
    if responses.shape != (bags.size,):
        raise ValueError(f"responses has shape {responses.shape}, expected ({bags.size},)")
    return rows_mixed(_estimate)(x, responses, bags, jnp.asarray(rho, compute_dtype(x)), ridge=ridge)


def population_shrinkage(rho: float | Array, bag_size: int) -> Array:
    """Returns what is left of the true weights in the limit of many random bags, `1 / (1 + rho (k - 1))`.

    Args:
        rho: >= 0, see `interpolated_loss`.
        bag_size: k >= 1; the estimator times the inverse of this factor is unbiased.

    Returns:
        float32 scalar.

    Raises:
        ValueError: `bag_size` is below 1.

    Example:
        >>> float(population_shrinkage(1.0, 4))
        0.25

    Source:
        Follows from the normal equations for x ~ N(0, I); arXiv 2401.11081, section 3.
    """
    at_least_one(bag_size=bag_size)
    return 1.0 / (1.0 + jnp.asarray(rho, jnp.float32) * (bag_size - 1))


def bag_risk(num_features: int, num_bags: int, noise_variance: float | Array) -> Array:
    """Returns the risk `E |theta - theta_0|^2 = sigma^2 d / (m - d - 1)` of the bag loss for x ~ N(0, I).

    Args:
        num_features: d.
        num_bags: m.
        noise_variance: sigma^2 of a single response.

    Returns:
        float32 scalar; infinite for `m <= d + 1`.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> float(bag_risk(50, 101, 2.0))
        2.0

    Source:
        Expectation of an inverse Wishart matrix; the signal-to-noise ratio of a bag does not depend on its size.
    """
    at_least_one(num_features=num_features, num_bags=num_bags)
    spare = num_bags - num_features - 1
    return jnp.asarray(noise_variance, jnp.float32) * num_features / spare if spare > 0 else jnp.float32(jnp.inf)


def dp_aggregate(
    key: Array,
    responses: Array,
    *,
    epsilon: float,
    clip: float,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
) -> Array:
    """Returns the mean response of each bag with noise that makes all of them private in each single response.

    `mean_i clip(y_i, -C, C) + Laplace(2 C / (k epsilon))`: one response changes one mean by at most 2 C / k.

    Args:
        key: of the noise.
        responses: float [B, N], or [T] with `segment_ids`, of the instances.
        epsilon: > 0, privacy of a label.
        clip: C > 0.
        where: bool, like `responses`, real instances (how many a bag has is not protected).
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        [B] in the dtype of `responses`; an empty bag is 0, without noise.

    Raises:
        ValueError: shapes do not fit, `epsilon` or `clip` is not positive.

    Example:
        >>> mean = jax.jit(lambda key, y: dp_aggregate(key, y, epsilon=1e6, clip=3.0))
        >>> mean(jax.random.key(0), jnp.array([[1.0, 9.0]])).round(2).tolist()
        [2.0]

    Source:
        Javanmard et al., arXiv 2401.11081, section 5 (Laplace mechanism; constants reconstructed).
    """
    for name, value in (("epsilon", epsilon), ("clip", clip)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    bags = _bags_of(responses, where, segment_ids, num_segments)

    def run(responses, bags, key):
        wide = zero_where_false(responses, bags.keep).astype(compute_dtype(responses))
        mean = bags.mean(jnp.clip(wide, -clip, clip))
        scale = safe_divide(jnp.full(mean.shape, 2 * clip / epsilon, mean.dtype), bags.count.astype(mean.dtype))
        return (mean + scale * jax.random.laplace(key, mean.shape, mean.dtype)).astype(responses.dtype)

    return rows_mixed(run)(responses, bags, key)


def optimal_bag_size(
    num_examples: int,
    num_features: int,
    *,
    signal: float,
    noise_variance: float,
    clip: float,
    epsilon: float,
    sizes: Sequence[int],
    rho: float = 1.0,
) -> tuple[Array, Array]:
    """Returns the bag size of least risk when a linear model is fitted to private means, and the risk of each size.

    With c = 1 + rho (k - 1), m = n / k, S = |theta_0|^2 and x ~ N(0, I), to first order in d / m,

        E |theta - theta_0|^2 = (1 - 1 / c)^2 S + d (sigma^2 + 8 C^2 / (k epsilon^2)) / (m c^2)
                                + (d + 1) S rho^2 k (k - 1) / (m c^4)

    bias, noise, and the fluctuation of the shrinkage. Larger bags drown less in noise, but shrink more.

    Args:
        num_examples: n.
        num_features: d.
        signal: S >= 0.
        noise_variance: sigma^2 of a single response.
        clip: C > 0, of `dp_aggregate`; so large that it cuts nothing.
        epsilon: > 0; infinity is no privacy.
        sizes: the sizes k to choose from.
        rho: >= 0, of the interpolated loss; with 0 the best size is always 1.

    Returns:
        int32 scalar, the best size, and float32 [len(sizes)], the risks.

    Raises:
        ValueError: a size is below 1, or an option is out of range.

    Example:
        >>> options = {"signal": 1.0, "noise_variance": 1.0, "clip": 3.0, "sizes": [1, 2, 4, 8]}
        >>> best = jax.jit(lambda: [optimal_bag_size(5000, 50, epsilon=e, **options)[0] for e in (0.5, 1e6)])
        >>> [int(size) for size in best()]
        [4, 1]

    Source:
        Javanmard et al., arXiv 2401.11081, section 5 (the trade-off); the formula is derived here.
    """
    at_least_one(num_examples=num_examples, num_features=num_features)
    for name, value in (("epsilon", epsilon), ("clip", clip)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    if rho < 0:
        raise ValueError(f"rho={rho} must not be negative")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={sizes} must be sizes of at least 1")
    k = jnp.asarray(sizes, jnp.float32)
    shrink, bags = 1 + rho * (k - 1), num_examples / k
    bias = jnp.square(1 - 1 / shrink) * signal
    noise = num_features * (noise_variance + 8 * clip**2 / (k * epsilon**2)) / (bags * shrink**2)
    fluctuation = (num_features + 1) * signal * rho**2 * k * (k - 1) / (bags * shrink**4)
    risks = bias + noise + fluctuation
    return jnp.asarray(sizes, jnp.int32)[jnp.argmin(risks)], risks


def random_bags(key: Array, num_examples: int, bag_size: int) -> Array:
    """Returns `segment_ids` of a random partition into bags of equal size.

    Args:
        key: decides it.
        num_examples: n.
        bag_size: k; the n mod k examples left over are padding.

    Returns:
        int32 [n], 0 to n // k - 1, or -1.

    Raises:
        ValueError: `bag_size` is not between 1 and `num_examples`.

    Example:
        >>> sorted(jax.jit(lambda key: random_bags(key, 5, 2))(jax.random.key(0)).tolist())
        [-1, 0, 0, 1, 1]
    """
    if not 1 <= bag_size <= num_examples:
        raise ValueError(f"bag_size={bag_size} must be between 1 and num_examples={num_examples}")
    ids = jnp.arange(num_examples, dtype=jnp.int32) // bag_size
    ids = jnp.where(ids < num_examples // bag_size, ids, jnp.int32(-1))
    return jax.random.permutation(key, ids)


def _terms(predictions: Array, responses: Array, bags: Bags, loss: _Loss) -> tuple[Array, Array]:
    """Returns the bag loss and the instance loss of each bag, both [B]."""
    if loss != "squared" and not callable(loss):
        raise ValueError(f"loss={loss!r} must be 'squared' or a function of (response, prediction)")
    each = (lambda y, f: jnp.square(y - f)) if loss == "squared" else loss
    dtype = compute_dtype(predictions)
    wide = zero_where_false(predictions, bags.keep).astype(dtype)
    some = bags.count > 0
    target = zero_where_false(responses, some).astype(dtype)
    spread = jnp.broadcast_to(bags.spread(target), wide.shape)
    return zero_where_false(each(target, bags.mean(wide)), some), bags.mean(each(spread, wide))


def _estimate(x, responses, bags, rho, *, ridge):
    wide = zero_where_false(x, bags.keep).astype(compute_dtype(x))
    some = bags.count > 0
    target = zero_where_false(responses, some).astype(wide.dtype)
    centre = bags.mean(wide)
    off = zero_where_false(wide - bags.spread(centre), bags.keep)
    # The root of 1 / k on each row makes one product of all rows the sum of the bags' means.
    share = safe_divide(jnp.ones(bags.size, wide.dtype), bags.count.astype(wide.dtype))
    rows = (off * jnp.sqrt(bags.spread(share))[..., None]).reshape(-1, x.shape[-1])
    exact = {"precision": jax.lax.Precision.HIGHEST}
    number = jnp.maximum(jnp.sum(some), 1).astype(wide.dtype)
    matrix = (jnp.matmul(centre.T, centre, **exact) + rho * jnp.matmul(rows.T, rows, **exact)) / number
    right = jnp.matmul(centre.T, target, **exact) / number
    if ridge > 0:
        theta = jnp.linalg.solve(matrix + ridge * jnp.eye(x.shape[-1], dtype=wide.dtype), right)
    else:
        theta = jnp.matmul(jnp.linalg.pinv(matrix, hermitian=True), right, **exact)
    return theta.astype(x.dtype)


def _bags_of(values, where, segment_ids, num_segments) -> Bags:
    expected = 2 if segment_ids is None else 1
    if values.ndim != expected:
        raise ValueError(f"one number an instance is expected, [B, N] or [T] with segment_ids, got {values.shape}")
    return group(values[..., None], where, segment_ids, num_segments)


def _checked(predictions, responses, where, segment_ids, num_segments) -> Bags:
    bags = _bags_of(predictions, where, segment_ids, num_segments)
    if responses.shape != (bags.size,):
        raise ValueError(f"responses has shape {responses.shape}, expected ({bags.size},)")
    return bags
