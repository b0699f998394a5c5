"""Unifying Self-Supervised Clustering and Energy-Based Models (GEDI, 2023, arXiv 2401.00873).

One network with K logits f is an energy model of the images and a clustering of them at once. The objective is a lower
bound of the data's log-likelihood whose clustering part is least only without collapse, without stop-gradient,
momentum or Sinkhorn.

    p(x)    = sum_y exp f_y(x) / Z,   E(x) = -logsumexp f(x);      p(y | x) = softmax f(x)
    gen     = mean E(x) - mean E(x~),   x~ from Langevin dynamics, constants
    inv     = mean -sum_y p(y | x) log p(y | t(x)),   t(x) an augmented image; gradient through both
    prior   = -sum_y prior_y log mean_x p(y | x)
    loss    = w_gen gen + w_inv inv + w_prior prior
    x~     <- x~ - (step / 2) grad E(x~) + noise N(0, I),   started from a buffer of earlier samples

inv + prior >= log K for the uniform prior, with equality exactly if all predictions are certain, invariant under t and
equally many in each cluster. The neuro-symbolic use adds the log-likelihood of what is known of several images, such as
the sum of two digits.

Reconstructed: the weights 1, 50 and 10 and the sampler's settings (as usual for joint energy models); masks; the mean
of the predictions is taken in the log domain, so that an empty cluster has a finite loss and a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.collectives import all_mean, gather_rows, global_mean
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def gedi_loss(
    logits: Array,
    augmented: Array,
    sampled: Array | None = None,
    *,
    generative: float = 1.0,
    invariance: float = 50.0,
    balance: float = 10.0,
    prior: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the weighted sum of the generative, the invariance and the prior term.

    `generative (mean E(logits) - mean E(sampled)) + invariance inv + balance CE(prior, mean softmax(logits))`.

    Args:
        logits: float [N, K], of images.
        augmented: float [N, K], of the same images augmented.
        sampled: float [M, K], of samples of the model (`langevin`), held constant as inputs; None leaves the
            generative term out: clustering alone.
        generative: weight of the generative term.
        invariance: weight of the invariance term.
        balance: weight of the prior term.
        prior: float [K], shares of the clusters; None = uniform.
        where: bool [N], real images.
        axis_name: mapped axis over which images and samples are spread: the mean prediction is global.

    Returns:
        Scalar in the accumulation dtype. Without images, the terms of images are 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> sure = 50 * jnp.eye(2)
        >>> round(jax.jit(gedi_loss)(sure, sure).item() / 10, 4)  # weight of the prior term: 10, and log 2 is the least
        0.6931

    Source:
        Sansone, Manhaeve, arXiv 2401.00873 (weights reconstructed).
    """
    if logits.ndim != 2 or augmented.shape != logits.shape:
        raise ValueError(f"logits and augmented must have one shape [N, K], got {logits.shape} and {augmented.shape}")
    if sampled is not None and (sampled.ndim != 2 or sampled.shape[1] != logits.shape[1]):
        raise ValueError(f"sampled has shape {sampled.shape}, expected [M, {logits.shape[1]}]")
    if prior is not None and prior.shape != logits.shape[1:]:
        raise ValueError(f"prior has shape {prior.shape}, expected {logits.shape[1:]}, a share for each cluster")
    keep = checked_where(where, logits.shape[0])
    weights = {"generative": generative, "invariance": invariance, "balance": balance}
    return rows_mixed(_loss)(logits, augmented, sampled, prior, keep, axis_name=axis_name, **weights)


def energy(logits: Array) -> Array:
    """Returns the energy `-logsumexp(logits)`; its negative scores how much an input is like the data.

    Args:
        logits: float [..., K].

    Returns:
        float [...] in the dtype of `logits`.

    Example:
        >>> round(energy(jnp.zeros(2)).item(), 4)  # -log 2
        -0.6931

    Source:
        Grathwohl et al., Your Classifier is Secretly an Energy Based Model, arXiv 1912.03263.
    """
    return -masked_logsumexp(logits).astype(logits.dtype)


def langevin(
    energy_fn: Callable[[Array], Array],
    x: Array,
    key: Array,
    *,
    steps: int = 20,
    step_size: float = 1.0,
    noise: float = 0.01,
) -> Array:
    """Returns samples after so many steps of `x <- x - step_size / 2 grad E(x) + noise N(0, I)`.

    Args:
        energy_fn: float [N, ...] to float [N], the energy of each input, such as `lambda x: energy(net(params, x))`.
        x: float [N, ...], where the chains start.
        key: draws the noise.
        steps: number of steps.
        step_size: of the gradient; joint energy models take 1 or 2.
        noise: standard deviation of the noise, 0.01 to 0.03, which is far colder than what the step size would have.

    Returns:
        Shape and dtype of `x`, without gradient.

    Raises:
        ValueError: `steps` is negative.

    Example:
        >>> bowl = lambda x: jnp.sum(x**2, axis=1) / 2
        >>> run = jax.jit(lambda x: langevin(bowl, x, jax.random.key(0), noise=0.0, steps=2))
        >>> run(jnp.full((1, 1), 8.0)).tolist()
        [[2.0]]

    Source:
        Sansone, Manhaeve, arXiv 2401.00873; settings of Grathwohl et al., arXiv 1912.03263.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    dtype = compute_dtype(x)
    gradient = jax.grad(lambda x: jnp.sum(energy_fn(x)))

    def step(i, state):
        drift = gradient(state.astype(x.dtype)).astype(dtype)
        move = noise * jax.random.normal(jax.random.fold_in(key, i), x.shape, dtype)
        return state - step_size / 2 * drift + move

    start = jax.lax.stop_gradient(x).astype(dtype)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, start)).astype(x.dtype)


def draw_from_buffer(
    buffer: Array, key: Array, *, count: int, fresh: float = 0.05, low: float = -1.0, high: float = 1.0
) -> tuple[Array, Array]:
    """Returns where chains start: rows of the buffer, some replaced by uniform noise, and which rows.

    Write the samples back by `buffer.at[index].set(samples)`. A buffer starts as uniform noise.

    Args:
        buffer: float [S, ...], earlier samples (10000 in the paper's line of work).
        key: draws rows and noise.
        count: number of chains; a row may be drawn twice.
        fresh: probability of starting from noise.
        low: smallest value of the noise.
        high: largest value of the noise.

    Returns:
        `start` [count, ...] in the dtype of `buffer` and `index` int32 [count].

    Raises:
        ValueError: `count` is below 1, or the buffer is empty.

    Example:
        >>> draw = jax.jit(lambda buffer, key: draw_from_buffer(buffer, key, count=3))
        >>> [x.shape for x in draw(jnp.zeros((8, 2)), jax.random.key(0))]
        [(3, 2), (3,)]

    Source:
        Grathwohl et al., arXiv 1912.03263 (5% fresh).
    """
    if count < 1 or buffer.shape[0] < 1:
        raise ValueError(f"count={count} and the {buffer.shape[0]} rows of buffer must be at least 1")
    return rows_mixed(_draw)(buffer, key, count=count, fresh=fresh, low=low, high=high)


def sum_log_likelihood(log_probs_a: Array, log_probs_b: Array, total: Array) -> Array:
    """Returns the log-probability that two independent digits have the given sum: `log sum_{a + b = total} p_a p_b`.

    Args:
        log_probs_a: float [N, K], log-probabilities of the values 0..K - 1 of the first.
        log_probs_b: float [N, K], of the second.
        total: int [N]; a sum that cannot be (above 2 K - 2) has the logarithm of the smallest number, without gradient.

    Returns:
        float [N] in the dtype of `log_probs_a`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> half = jnp.log(jnp.full((1, 2), 0.5))
        >>> round(jnp.exp(sum_log_likelihood(half, half, jnp.array([1]))).item(), 4)
        0.5

    Source:
        Sansone, Manhaeve, arXiv 2401.00873, the experiment on symbol grounding.
    """
    if log_probs_a.ndim != 2 or log_probs_b.shape != log_probs_a.shape or total.shape != log_probs_a.shape[:1]:
        raise ValueError(
            "log_probs_a, log_probs_b and total must be [N, K], [N, K] and [N], "
            f"got {log_probs_a.shape}, {log_probs_b.shape} and {total.shape}"
        )
    return rows_mixed(_sum_log_likelihood)(log_probs_a, log_probs_b, total)


def clustering_scores(
    clusters: Array, labels: Array, *, num_clusters: int, num_classes: int, where: Array | None = None
) -> dict[str, Array]:
    """Returns how well clusters agree with classes, whatever their numbers.

    Args:
        clusters: int [N] in 0..K - 1.
        labels: int [N] in 0..C - 1; -1 is unlabelled and takes no part.
        num_clusters: K.
        num_classes: C.
        where: bool [N], real examples.

    Returns:
        `nmi`, mutual information as a share of the mean of the two entropies (1 if both are 0), and `accuracy` under
        the best one-to-one map of clusters to classes; float32 [], 0 without examples.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> scores = jax.jit(lambda c, y: clustering_scores(c, y, num_clusters=2, num_classes=2))
        >>> {name: value.item() for name, value in scores(jnp.array([1, 1, 0, 0]), jnp.array([0, 0, 1, 1])).items()}
        {'accuracy': 1.0, 'nmi': 1.0}

    Source:
        The measures of arXiv 2401.00873, as in scikit-learn.
    """
    if clusters.ndim != 1 or labels.shape != clusters.shape:
        raise ValueError(f"clusters and labels must have one shape [N], got {clusters.shape} and {labels.shape}")
    keep = checked_where(where, clusters.shape[0]) & (labels >= 0)
    return rows_mixed(_scores)(clusters, labels, keep, num_clusters=num_clusters, num_classes=num_classes)


def _loss(logits, augmented, sampled, prior, keep, *, generative, invariance, balance, axis_name):
    dtype = compute_dtype(logits, augmented)
    wide, other = (zero_where_false(x, keep).astype(dtype) for x in (logits, augmented))
    log_p, log_q = jax.nn.log_softmax(wide, axis=-1), jax.nn.log_softmax(other, axis=-1)
    total = invariance * global_mean(-jnp.sum(jnp.exp(log_p) * log_q, axis=-1), keep, axis_name=axis_name)
    everyone, exist = gather_rows(log_p, axis_name), gather_rows(keep, axis_name)
    number = jnp.sum(exist, dtype=dtype)
    log_mean = masked_logsumexp(everyone, exist[:, None], axis=0) - jnp.log(jnp.maximum(number, 1.0))
    share = jnp.full(log_mean.shape, 1 / log_mean.shape[0], dtype) if prior is None else prior.astype(dtype)
    # Every shard has the same mean; `all_mean` lets JAX know.
    total = total - balance * all_mean(jnp.sum(share * jnp.where(number > 0, log_mean, 0.0)), axis_name)
    if sampled is not None:
        low = global_mean(-masked_logsumexp(wide), keep, axis_name=axis_name)
        high = global_mean(-masked_logsumexp(sampled.astype(dtype)), axis_name=axis_name)
        total = total + generative * (low - high)
    return total


def _draw(buffer, key, *, count, fresh, low, high):
    key_row, key_fresh, key_noise = jax.random.split(key, 3)
    index = jax.random.randint(key_row, (count,), 0, buffer.shape[0], jnp.int32)
    new = jax.random.bernoulli(key_fresh, fresh, (count,)).reshape((count,) + (1,) * (buffer.ndim - 1))
    dtype = compute_dtype(buffer)
    noise = jax.random.uniform(key_noise, (count, *buffer.shape[1:]), dtype, low, high)
    return jnp.where(new, noise.astype(buffer.dtype), buffer[index]), index


def _sum_log_likelihood(log_probs_a, log_probs_b, total):
    dtype, size = compute_dtype(log_probs_a, log_probs_b), log_probs_a.shape[1]
    rest = total[:, None] - jnp.arange(size)[None, :]
    possible = (rest >= 0) & (rest < size)
    second = jnp.take_along_axis(log_probs_b.astype(dtype), jnp.clip(rest, 0, size - 1), axis=1)
    result = masked_logsumexp(log_probs_a.astype(dtype) + second, possible)
    floor = jnp.log(jnp.finfo(dtype).tiny)
    return jnp.where(jnp.any(possible, axis=1), result, floor).astype(log_probs_a.dtype)


def _scores(clusters, labels, keep, *, num_clusters, num_classes):
    first = jax.nn.one_hot(clusters, num_clusters) * keep[:, None].astype(jnp.float32)
    table = jnp.matmul(first.T, jax.nn.one_hot(labels, num_classes), precision=jax.lax.Precision.HIGHEST)
    number = jnp.sum(table)
    joint = safe_divide(table, number)
    entropy = lambda p: -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    a, b = entropy(jnp.sum(joint, axis=1)), entropy(jnp.sum(joint, axis=0))
    shared = jnp.maximum(a + b - entropy(joint), 0.0)
    certain = jnp.where(number > 0, 1.0, 0.0)
    nmi = jnp.where(a + b > 0, 2 * shared / jnp.where(a + b > 0, a + b, 1.0), certain)
    column = linear_assignment(table, maximize=True)
    matched = jnp.where(column >= 0, jnp.take_along_axis(table, jnp.maximum(column, 0)[:, None], axis=1)[:, 0], 0.0)
    return {"accuracy": safe_divide(jnp.sum(matched), number), "nmi": nmi}
