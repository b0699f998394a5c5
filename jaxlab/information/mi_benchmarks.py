"""Distributions whose mutual information is known, and the classical estimate that needs no training.

Beyond Normal: On the Evaluation of Mutual Information Estimators (2023, arXiv 2306.11078) is where the families of
distributions and the maps come from; Estimating mutual information (2004, arXiv cond-mat/0305641) is the estimate by
nearest neighbours. What the family's estimators are trained on and compared with. In nats:

    Gaussian     I = ( log|S_xx| + log|S_yy| - log|S| ) / 2
    Student t    I = I_Gauss(S) + f(v) + f(v + m + n) - f(v + m) - f(v + n),  f(u) = log Gamma(u/2) - (u/2) psi(u/2)
    X ~ U(0, 1), Y = X + U(-e, e):   I = e - log(2 e)  for e <= 1/2,   1 / (4 e)  otherwise
    KSG          I = psi(k) + psi(N) - mean_i [ psi(n_x(i) + 1) + psi(n_y(i) + 1) ]

with n_x(i) the other rows whose x is nearer to x_i than the k-th neighbour of (x_i, y_i) in the larger of both
distances. Monotone maps of single coordinates change no information.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.masked import compute_dtype, masked_mean, zero_where_false
from jaxlab.ops.sharding import rows_mixed

FAMILIES = ("normal", "student", "additive_noise")
MAPS = ("base", "halfcube", "asinh", "wigglify")


def covariance_information(covariance: Array, size_x: int, *, degrees: float | Array | None = None) -> Array:
    """Returns the mutual information of two parts of a Gaussian or of a Student t vector.

    Args:
        covariance: float [..., D, D], covariance or dispersion of (x, y), positive definite.
        size_x: number of leading coordinates that are x, between 1 and D - 1.
        degrees: > 0, degrees of freedom of the Student t distribution; None = Gaussian.

    Returns:
        float [...] in nats, in the accumulation dtype.

    Raises:
        ValueError: `covariance` is not square or `size_x` is out of range.

    Example:
        >>> cov = jnp.array([[1.0, 0.8], [0.8, 1.0]])
        >>> round(float(covariance_information(cov, 1)), 4)
        0.5108

    Source:
        Czyz et al., arXiv 2306.11078.
    """
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"covariance must be [..., D, D], got {covariance.shape}")
    size = covariance.shape[-1]
    if not 1 <= size_x < size:
        raise ValueError(f"size_x={size_x} must be between 1 and {size - 1}")
    wide = covariance.astype(compute_dtype(covariance))
    log_det = lambda a: jnp.linalg.slogdet(a)[1]
    parts = log_det(wide[..., :size_x, :size_x]) + log_det(wide[..., size_x:, size_x:])
    information = (parts - log_det(wide)) / 2
    if degrees is None:
        return information
    v = jnp.asarray(degrees, wide.dtype)
    f = lambda u: jax.scipy.special.gammaln(u / 2) - u / 2 * jax.scipy.special.digamma(u / 2)
    return information + f(v) + f(v + size) - f(v + size_x) - f(v + size - size_x)


def additive_noise_information(eps: Array) -> Array:
    """Returns the information between X ~ U(0, 1) and Y = X + U(-eps, eps).

    Args:
        eps: float [...], > 0.

    Returns:
        float [...] in nats, in the dtype of `eps`.

    Example:
        >>> additive_noise_information(jnp.array([0.5, 1.0])).tolist()
        [0.5, 0.25]

    Source:
        Czyz et al., arXiv 2306.11078.
    """
    small = jnp.minimum(eps, 0.5)
    return jnp.where(eps <= 0.5, small - jnp.log(2 * small), 1 / (4 * jnp.maximum(eps, 0.5)))


def monotone_map(x: Array, name: str) -> Array:
    """Returns each entry under an increasing map, which changes no information.

    Args:
        x: float [...].
        name: "base" (nothing), "halfcube" `sign(x) |x|^1.5`, "asinh", or "wigglify"
            `x + 0.4 sin x + 0.2 sin(1.7 x + 1) + 0.03 sin(3.3 x - 2.5)`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: `name` is unknown.

    Example:
        >>> monotone_map(jnp.array([-4.0, 4.0]), "halfcube").tolist()
        [-8.0, 8.0]

    Source:
        Czyz et al., arXiv 2306.11078; the constants of "wigglify" are those for x, used for both sides
        (reconstructed).
    """
    if name == "base":
        return x
    if name == "halfcube":
        size = jnp.abs(x)
        return x * jnp.sqrt(jnp.where(size > 0, size, 1.0))
    if name == "asinh":
        return jnp.arcsinh(x)
    if name == "wigglify":
        return x + 0.4 * jnp.sin(x) + 0.2 * jnp.sin(1.7 * x + 1) + 0.03 * jnp.sin(3.3 * x - 2.5)
    raise ValueError(f"name={name!r} must be one of {', '.join(MAPS)}")


def sample_information_task(
    key: Array, *, rows: int, size: int, family: str = "normal", transform: str = "base", strength: float = 1.0
) -> tuple[Array, Array, Array]:
    """Returns a sample of a random distribution with known information.

    "normal" and "student": dispersion of (x, y) from a random loading matrix, correlations as strong as those of
    `strength` factors to one part of noise, drawn anew each time; degrees of freedom one of 1 to 10.
    "additive_noise": noise uniform in 0.1 to 2 for each coordinate.

    Args:
        key: draws the distribution and the sample.
        rows: N.
        size: coordinates of x and of y, each.
        family: "normal", "student" or "additive_noise".
        transform: see `monotone_map`, applied to every coordinate.
        strength: > 0, largest loading; it is drawn uniformly below.

    Returns:
        `x` and `y` float32 [N, size], and the information float32 [] in nats.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> draw = jax.jit(lambda key: sample_information_task(key, rows=5, size=2))
        >>> x, y, information = draw(jax.random.key(0))
        >>> x.shape, y.shape, bool(information > 0)
        ((5, 2), (5, 2), True)

    Source:
        After Czyz et al., arXiv 2306.11078; ranges of degrees and noise as in the code grgera/mist. Reconstructed:
        whole degrees, and the random loadings, which stand in for its dense, sparse and latent-variable dispersions.
    """
    if rows < 1 or size < 1:
        raise ValueError(f"rows={rows} and size={size} must be at least 1")
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} must be one of {', '.join(FAMILIES)}")
    if not strength > 0:
        raise ValueError(f"strength={strength} must be positive")
    keys = jax.random.split(key, 5)
    if family == "additive_noise":
        eps = jax.random.uniform(keys[0], (size,), minval=0.1, maxval=2.0)
        x = jax.random.uniform(keys[1], (rows, size))
        y = x + eps[None] * jax.random.uniform(keys[2], (rows, size), minval=-1.0)
        information = jnp.sum(additive_noise_information(eps))
    else:
        # (x, y) = loadings of 2 size common factors, and independent noise.
        loadings = strength * jax.random.uniform(keys[0]) * jax.random.normal(keys[1], (2 * size, 2 * size))
        covariance = jnp.matmul(loadings, loadings.T) + jnp.eye(2 * size)
        # Unit variances, or the scale of the coordinates would give the strength of their dependence away.
        scale = jnp.sqrt(jnp.diagonal(covariance))
        covariance = covariance / (scale[:, None] * scale[None, :])
        root = jnp.linalg.cholesky(covariance)
        sample = jnp.matmul(jax.random.normal(keys[2], (rows, 2 * size)), root.T)
        degrees = None
        if family == "student":
            # A Student t vector is a Gaussian one over the root of an independent chi-square over its degrees, which
            # is the sum of so many squares.
            degrees = 1 + jnp.floor(10 * jax.random.uniform(keys[3]))
            squares = jnp.square(jax.random.normal(keys[4], (rows, 10)))
            chi = jnp.sum(jnp.where((jnp.arange(10) < degrees)[None, :], squares, 0.0), axis=1, keepdims=True)
            sample = sample * jnp.sqrt(degrees / chi)
        information = covariance_information(covariance, size, degrees=degrees)
        x, y = sample[:, :size], sample[:, size:]
    return monotone_map(x, transform), monotone_map(y, transform), information


def ksg_information(x: Array, y: Array, *, k: int = 3, where: Array | None = None) -> Array:
    """Returns the estimate of the mutual information by k nearest neighbours (Kraskov, Stoegbauer, Grassberger).

    Args:
        x: float [N, D].
        y: float [N, E].
        k: neighbours, >= 1.
        where: bool [N], real rows.

    Returns:
        Scalar in nats, in the accumulation dtype, without gradient: it counts. 0 with at most k rows.

    Raises:
        ValueError: shapes do not fit or `k` is out of range.

    Example:
        >>> x = jnp.arange(8.0)[:, None]
        >>> far = jax.jit(lambda y: ksg_information(x, y, k=1))
        >>> bool(far(x) > far((x * 3) % 8))
        True

    Source:
        Kraskov, Stoegbauer, Grassberger, arXiv cond-mat/0305641, eq. 8.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x and y must be [N, D] and [N, E], got {x.shape} and {y.shape}")
    rows = x.shape[0]
    if where is not None and where.shape != (rows,):
        raise ValueError(f"where has shape {where.shape}, expected ({rows},)")
    if not 1 <= k < max(rows, 2):
        raise ValueError(f"k={k} must be between 1 and {rows - 1}, the other rows")
    keep = jnp.ones(rows, bool) if where is None else where

    def run(x, y, keep):
        wide = compute_dtype(x, y)
        others = keep[:, None] & keep[None, :] & ~jnp.eye(rows, dtype=bool)

        def distances(a):
            """The largest difference over the coordinates, one after the other to save memory."""
            a = zero_where_false(a, keep).astype(wide)
            start = jnp.zeros((rows, rows), wide) + 0 * a[:, :1]
            further = lambda d, v: (jnp.maximum(d, jnp.abs(v[:, None] - v[None, :])), None)
            return jnp.where(others, jax.lax.scan(further, start, a.T)[0], jnp.inf)

        in_x, in_y = distances(x), distances(y)
        nearest = -jax.lax.top_k(-jnp.maximum(in_x, in_y), min(k, rows))[0][:, -1:]
        psi = jax.scipy.special.digamma
        near = [psi(jnp.sum(d < nearest, axis=1, dtype=wide) + 1) for d in (in_x, in_y)]
        count = jnp.sum(keep, dtype=wide)
        value = psi(jnp.asarray(k, wide)) + psi(jnp.maximum(count, 1)) - masked_mean(near[0] + near[1], keep)
        return jnp.where(count > k, value, jnp.zeros_like(value))

    return rows_mixed(run)(*jax.lax.stop_gradient((x, y)), keep)
