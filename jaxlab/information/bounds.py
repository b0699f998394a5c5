"""Variational lower bounds of mutual information, from a critic's scores of all pairs in a batch.

On Variational Bounds of Mutual Information (2019, arXiv 1905.06922) compares most of them. What the family's methods
stand on and are compared with. A critic f gives `scores[i, j] = f(x_i, y_j)`; pairs (i, i) are drawn from the joint
distribution p, the others from the product q of the marginals. All are in nats, and lower bounds in expectation:

    Donsker-Varadhan    E_p f - log E_q e^f                     MINE; its estimate from a batch is biased upwards
    NWJ                 E_p f - E_q e^(f - 1)                   unbiased, large variance
    InfoNCE             E_i [f_ii - log mean_j e^(f_ij)]        small variance, at most log N
    Jensen-Shannon      -E_p softplus(-f) - E_q softplus(f)     bounds another divergence; its best f is log p/q
    SMILE               E_p f - log E_q e^clip(f, -t, t)        no longer a bound; gradient of Jensen-Shannon
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_mean
from jaxlab.ops.sharding import rows_mixed

_LARGEST_EXPONENT = 80.0  # e^80 is finite in float32


def donsker_varadhan_bound(scores: Array, *, where: Array | None = None) -> Array:
    """Returns the Donsker-Varadhan bound `mean_i f_ii - log mean_{i != j} e^(f_ij)`.

    Args:
        scores: float [N, N], critic values f(x_i, y_j).
        where: bool [N], real pairs; rows and columns of the others take no part.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(donsker_varadhan_bound(jnp.zeros((4, 4))))
        0.0

    Source:
        Donsker, Varadhan (1983); as an estimator, Belghazi et al., MINE, arXiv 1801.04062, eq. 10.
    """
    return _bound(scores, where, lambda own, f, joint, product: masked_mean(own, joint) - _log_mean_exp(f, product))


def nwj_bound(scores: Array, *, where: Array | None = None) -> Array:
    """Returns the bound of Nguyen, Wainwright and Jordan `mean_i f_ii - mean_{i != j} e^(f_ij - 1)`.

    It is tight at `f = 1 + log p / q`. Exponents are cut at 80, where float32 ends, and have no gradient above
    (reconstructed).

    Args:
        scores: float [N, N], critic values f(x_i, y_j).
        where: bool [N], real pairs.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> round(float(nwj_bound(jnp.ones((4, 4)))), 6)
        0.0

    Source:
        Nguyen, Wainwright, Jordan, arXiv 0809.0853; Poole et al., arXiv 1905.06922, eq. 6.
    """

    def value(own, f, joint, product):
        return masked_mean(own, joint) - masked_mean(jnp.exp(jnp.minimum(f - 1, _LARGEST_EXPONENT)), product)

    return _bound(scores, where, value)


def info_nce_bound(scores: Array, *, where: Array | None = None) -> Array:
    """Returns the InfoNCE bound `mean_i [f_ii - log mean_j e^(f_ij)]`, j over all pairs, i itself included.

    It is at most log N, and so is any conclusion drawn from it.

    Args:
        scores: float [N, N], critic values f(x_i, y_j).
        where: bool [N], real pairs.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> round(float(info_nce_bound(50 * jnp.eye(4)) - jnp.log(4)), 4)
        0.0

    Source:
        van den Oord, Li, Vinyals, arXiv 1807.03748, section 2.3; Poole et al., arXiv 1905.06922, eq. 12.
    """

    def value(own, f, joint, product):
        both = joint[:, None] & joint[None, :]
        count = jnp.maximum(jnp.sum(joint, dtype=f.dtype), 1)
        return masked_mean(own - _finite(masked_logsumexp(f, both)), joint) + jnp.log(count)

    return _bound(scores, where, value)


def jensen_shannon_bound(scores: Array, *, where: Array | None = None) -> Array:
    """Returns the bound of the Jensen-Shannon divergence `-mean_i softplus(-f_ii) - mean_{i != j} softplus(f_ij)`.

    It rises with the dependence but is no estimate of the information: at its best critic `f = log p / q` it is
    `2 JSD(p, q) - log 4`. Train with it, and read the information off with another bound.

    Args:
        scores: float [N, N], critic values f(x_i, y_j).
        where: bool [N], real pairs.

    Returns:
        Scalar in nats, at most 0, in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> round(float(jensen_shannon_bound(jnp.zeros((4, 4))) + jnp.log(4)), 6)
        0.0

    Source:
        Nowozin, Cseke, Tomioka, f-GAN, arXiv 1606.00709; Hjelm et al., Deep InfoMax, arXiv 1808.06670, eq. 4.
    """
    return _bound(scores, where, _jensen_shannon)


def smile_estimate(scores: Array, *, clip: float | None = 5.0, where: Array | None = None) -> Array:
    """Returns the SMILE estimate `mean_i f_ii - log mean_{i != j} e^(clip(f_ij, -t, t))` with the gradient of another.

    Clipping trades bias for variance. The gradient is that of `jensen_shannon_bound`, so that training does not see the
    clipping.

    Args:
        scores: float [N, N], critic values f(x_i, y_j).
        clip: t > 0; None clips nothing, which is Donsker-Varadhan's value.
        where: bool [N], real pairs.

    Returns:
        Scalar in nats, in the accumulation dtype; 0 with fewer than two pairs.

    Raises:
        ValueError: shapes do not fit or `clip` is not positive.

    Example:
        >>> float(smile_estimate(jnp.zeros((4, 4))))
        0.0

    Source:
        Song, Ermon, Understanding the Limitations of Variational Mutual Information Estimators, arXiv 1910.06222, eq.
        12; code ermongroup/smile-mi-estimator (clip 5, gradient).
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive")

    def value(own, f, joint, product):
        clipped = f if clip is None else jnp.clip(f, -clip, clip)
        estimate = masked_mean(own, joint) - _log_mean_exp(clipped, product)
        trained = _jensen_shannon(own, f, joint, product)
        return trained + jax.lax.stop_gradient(estimate - trained)

    return _bound(scores, where, value)


def gaussian_mutual_information(correlation: Array) -> Array:
    """Returns the mutual information of jointly Gaussian pairs: `-1/2 sum_d log(1 - rho_d^2)`.

    Args:
        correlation: float [..., D] in (-1, 1), of each pair of coordinates, which are independent of the others.

    Returns:
        float [...] in nats, in the dtype of `correlation`; infinite where a correlation is 1 or -1.

    Raises:
        ValueError: `correlation` is a scalar.

    Example:
        >>> round(float(gaussian_mutual_information(jnp.array([0.5, 0.0]))), 4)
        0.1438
    """
    if correlation.ndim < 1:
        raise ValueError(f"correlation must be [..., D], got shape {correlation.shape}")
    wide = correlation.astype(compute_dtype(correlation))
    return (-0.5 * jnp.sum(jnp.log1p(-wide * wide), axis=-1)).astype(correlation.dtype)


def _bound(scores: Array, where: Array | None, value: Callable[..., Array]) -> Array:
    """Returns `value(f_ii [N], f [N, N], joint [N], product [N, N])`, and 0 where no pair of different rows is."""
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores must be [N, N], got {scores.shape}")
    count = scores.shape[0]
    if where is not None and where.shape != (count,):
        raise ValueError(f"where has shape {where.shape}, expected ({count},)")
    joint = jnp.ones(count, bool) if where is None else where

    def run(scores, joint):
        both = joint[:, None] & joint[None, :]
        f = jnp.where(both, scores, jnp.zeros((), scores.dtype)).astype(compute_dtype(scores))
        product = both & ~jnp.eye(count, dtype=bool)
        enough = jnp.sum(joint) > 1
        return jnp.where(enough, value(jnp.diagonal(f), f, joint, product), 0.0)

    return rows_mixed(run)(scores, joint)


def _jensen_shannon(own: Array, f: Array, joint: Array, product: Array) -> Array:
    return -masked_mean(jax.nn.softplus(-own), joint) - masked_mean(jax.nn.softplus(f), product)


def _log_mean_exp(f: Array, keep: Array) -> Array:
    """Returns the logarithm of the mean of e^f over the entries kept."""
    count = jnp.maximum(jnp.sum(keep, dtype=f.dtype), 1)
    return _finite(masked_logsumexp(f.reshape(-1), keep.reshape(-1))) - jnp.log(count)


def _finite(lse: Array) -> Array:
    return jnp.where(jnp.isfinite(lse), lse, 0.0)
