"""Learning Efficient Coding of Natural Images with Maximum Manifold Capacity Representations (2023, arXiv 2303.03307).

The views of one image form a manifold on the unit sphere. A representation keeps many manifolds apart when each is
small and their centres point in many directions; one number says both: the nuclear norm of the matrix of centres.

    z_vp = view v of image p / its length,   c_p = mean_v z_vp
    loss = -||C||_* + (local_weight / P) sum_p ||Z_p||_*,    ||X||_* = sum of the singular values of X

A centre is shorter the more its views differ, so that the first term alone (local_weight = 0, the default) makes the
manifolds small; it is at least -sqrt(P min(P, D)). No pair of images is compared, and the cost is linear in the number
of views. With an averaged encoder (the momentum form) the centres are the mean of both encoders' centres.

Reconstructed: masks, and the gradient at singular values of 0, where the norm has a kink. It is U V^T over the singular
values above `eps` times the largest, the shortest of all subgradients and the same whatever the decomposition returns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_mean, gather_rows, global_mean
from jaxlab.ops.masked import compute_dtype, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def mmcr_loss(
    views: Array,
    *,
    targets: Array | None = None,
    local_weight: float = 0.0,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns minus the nuclear norm of the images' mean embeddings: low if views agree and images spread out.

    `-||C||_* + local_weight * mean_p ||Z_p||_*`, over the images of all shards.

    Args:
        views: float [V, B, D], V >= 1 views of each image; need not be normalised, a zero vector counts as zero.
        targets: float [W, B, D], the same images by the averaged encoder, constant; centres are then the mean of both
            encoders' centres.
        local_weight: lambda >= 0, of the manifolds' own nuclear norms (of `views` only).
        where: bool [B], real images.
        axis_name: mapped axis over which the images are spread; the matrix of centres is that of all shards.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input). It is a sum, not a mean: it grows with
        `sqrt(P min(P, D))`. Without any image it is 0.

    Raises:
        ValueError: shapes do not fit or `local_weight` is negative.

    Example:
        >>> x = jnp.eye(4)
        >>> [float(jax.jit(mmcr_loss)(jnp.stack([x, other])).round(3)) for other in (x, x[::-1])]
        [-4.0, -2.0]

    Source:
        Yerxa et al., arXiv 2303.03307; code ThomasYerxa/mmcr (both the plain loss and the one with momentum). The code
        drops images whose centre is not finite: pass them in `where`.
    """
    keep = _checked(views, where)
    if targets is not None and (targets.ndim != 3 or targets.shape[0] < 1 or targets.shape[1:] != views.shape[1:]):
        raise ValueError(f"targets has shape {targets.shape}, expected [W >= 1, {views.shape[1]}, {views.shape[2]}]")
    if local_weight < 0:
        raise ValueError(f"local_weight={local_weight} must not be negative")
    targets = None if targets is None else jax.lax.stop_gradient(targets)
    return rows_mixed(_loss)(views, targets, keep, local_weight=local_weight, axis_name=axis_name)


def nuclear_norm(x: Array, *, eps: float | None = None) -> Array:
    """Returns the sum of the singular values of a matrix, with a gradient that is finite everywhere.

    The gradient is `U V^T` over the singular values above `eps * the largest`: finite for equal singular values, where
    differentiating the decomposition divides by their difference, and 0 for the zero matrix.

    Args:
        x: float [..., n, m].
        eps: >= 0, below which share of the largest a singular value counts as 0 for the gradient; None = the rounding
            error of the decomposition, `max(n, m)` times that of the dtype.

    Returns:
        Scalar in the accumulation dtype, or `[...]` in the dtype of `x`.

    Raises:
        ValueError: `x` has fewer than two axes or `eps` is negative.

    Example:
        >>> value, grad = jax.jit(jax.value_and_grad(nuclear_norm))(jnp.diag(jnp.array([2.0, -2.0, 0.0])))
        >>> float(value), (jnp.diag(grad).round(3) + 0.0).tolist()
        (4.0, [1.0, -1.0, 0.0])

    Source:
        Watson, Characterization of the subdifferential of some matrix norms, Linear Algebra and its Applications 170
        (1992), with the subgradient of least length.
    """
    if x.ndim < 2:
        raise ValueError(f"x must be [..., n, m], got {x.shape}")
    if eps is not None and eps < 0:
        raise ValueError(f"eps={eps} must not be negative")
    norm = rows_mixed(_norm)(x, eps=eps)
    return norm if norm.ndim == 0 else norm.astype(x.dtype)


def effective_rank(embeddings: Array, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns over how many directions embeddings spread: the exponential of the entropy of their singular values.

    `exp(-sum_i p_i log p_i)`, `p = s / sum(s)`: from 1 (all on one line) to min(N, D) (orthogonal, of one length).

    Args:
        embeddings: float [N, D], as they are: neither centred nor normalised here.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread.

    Returns:
        Scalar in the accumulation dtype; 0 if all rows are zero or there is none.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> round(float(jax.jit(effective_rank)(jnp.eye(3))), 3)
        3.0

    Source:
        Roy, Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got {embeddings.shape}")
    keep = _checked(embeddings[None], where)
    return rows_mixed(_effective_rank)(embeddings, keep, axis_name=axis_name)


def manifold_statistics(views: Array, *, where: Array | None = None, axis_name: str | None = None) -> dict[str, Array]:
    """Returns how small the manifolds of views are and how far their centres spread, to watch; no gradient passes.

    Args:
        views: float [V, B, D], V >= 1 views of each image; need not be normalised.
        where: bool [B], real images.
        axis_name: mapped axis over which the images are spread.

    Returns:
        Scalars in the accumulation dtype, 0 without any image: `compactness`, the mean of `|c_p|^2`, 1 if all views
        agree (1 - it is the variance within a manifold); `capacity`, `||C||_*` as a share of its bound
        `sqrt(P min(P, D))`; `local_norm`, the mean of `||Z_p||_*`, from sqrt(V) if views agree to at most
        `sqrt(V min(V, D))`; and `effective_rank` of the centres.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> stats = jax.jit(manifold_statistics)(jnp.ones((2, 3, 4)))
        >>> {name: round(float(value), 2) for name, value in stats.items()}
        {'capacity': 0.58, 'compactness': 1.0, 'effective_rank': 1.0, 'local_norm': 1.41}

    Source:
        Yerxa et al., arXiv 2303.03307, section 3: the geometry that decides the capacity; names reconstructed.
    """
    keep = _checked(views, where)
    return rows_mixed(_statistics)(jax.lax.stop_gradient(views), keep, axis_name=axis_name)


def _checked(views, where):
    if views.ndim != 3 or views.shape[0] < 1:
        raise ValueError(f"views must be [V >= 1, B, D], got {views.shape}")
    if where is not None and where.shape != views.shape[1:2]:
        raise ValueError(f"where has shape {where.shape}, expected {views.shape[1:2]}")
    return jnp.ones(views.shape[1], bool) if where is None else where


def _unit(views, keep):
    """Returns unit vectors [B, V, D], zero where masked: a zero row changes no singular value."""
    return safe_normalize(zero_where_false(jnp.swapaxes(views, 0, 1), keep).astype(compute_dtype(views)))


def _loss(views, targets, keep, *, local_weight, axis_name):
    unit = _unit(views, keep)
    centres = jnp.mean(unit, axis=1)
    if targets is not None:
        centres = (centres + jnp.mean(_unit(targets, keep), axis=1).astype(centres.dtype)) / 2
    # Every shard has the same matrix and value; their mean is the value, and tells JAX that it is one.
    loss = -all_mean(_norm(gather_rows(centres, axis_name), eps=None), axis_name)
    if local_weight:
        loss = loss + local_weight * global_mean(_norm(unit, eps=None), keep, axis_name=axis_name)
    return loss


def _statistics(views, keep, *, axis_name):
    unit = _unit(views, keep)
    centres = jnp.mean(unit, axis=1)
    count = jnp.sum(gather_rows(keep, axis_name), dtype=centres.dtype)
    bound = jnp.sqrt(count * jnp.minimum(count, centres.shape[1]))
    values = jnp.linalg.svd(gather_rows(centres, axis_name), compute_uv=False)
    return {
        "capacity": all_mean(safe_divide(jnp.sum(values), bound), axis_name),
        "compactness": global_mean(jnp.sum(jnp.square(centres), axis=1), keep, axis_name=axis_name),
        "effective_rank": all_mean(_spread(values), axis_name),
        "local_norm": global_mean(_norm(unit, eps=None), keep, axis_name=axis_name),
    }


def _effective_rank(embeddings, keep, *, axis_name):
    wide = zero_where_false(embeddings, keep).astype(compute_dtype(embeddings))
    return all_mean(_spread(jnp.linalg.svd(gather_rows(wide, axis_name), compute_uv=False)), axis_name)


def _spread(values):
    """Returns the exponential of the entropy of singular values, 0 if all are 0."""
    share = safe_divide(values, jnp.sum(values))
    some = share > 0
    entropy = -jnp.sum(jnp.where(some, share * jnp.log(jnp.where(some, share, 1.0)), 0.0))
    return jnp.where(jnp.any(some), jnp.exp(entropy), 0.0)


def _norm(x, *, eps):
    """Returns the nuclear norm of each matrix [...] in the accumulation dtype."""
    wide = x.astype(compute_dtype(x))
    if eps is None:
        eps = max(x.shape[-2:]) * float(jnp.finfo(wide.dtype).eps)
    return _sum_of_singular_values(wide, float(eps))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_of_singular_values(x, eps):
    del eps
    return jnp.sum(jnp.linalg.svd(x, compute_uv=False), axis=-1)


@_sum_of_singular_values.defjvp
def _sum_of_singular_values_jvp(eps, primals, tangents):
    u, values, v = jnp.linalg.svd(primals[0], full_matrices=False)
    kept = (values > eps * jnp.max(values, axis=-1, keepdims=True)).astype(u.dtype)
    direction = jnp.matmul(u * kept[..., None, :], v, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(values, axis=-1), jnp.sum(direction * tangents[0], axis=(-2, -1))
