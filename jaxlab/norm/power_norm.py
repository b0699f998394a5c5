"""PowerNorm: Rethinking Batch Normalization in Transformers (PN, 2020, arXiv 2003.07845).

Batch statistics of text fluctuate so much that batch normalisation fails in transformers. PowerNorm keeps no mean,
divides by a RUNNING root mean square, and corrects the backward pass by a running estimate of what the division does.

    forward     psi_B^2 = mean over tokens of x^2,   xhat = x / psi,   y = gain * xhat + bias
                psi^2  <- a psi^2 + (1 - a) psi_B^2        (after its use: the forward divides by the previous value)
    backward    g = gain * dL/dy,   dL/dx = (g - nu * xhat) / psi
                nu     <- nu (1 - (1 - a) mean(xhat^2)) + (1 - a) mean(g * xhat)
    warm-up     the first steps divide by psi_B instead, while psi^2 is the plain mean of the psi_B^2 so far

All per feature. In front stands a scaling of each token by the root mean square of its features (in groups, one for
each attention head), which the official code has and the paper's algorithm has not: `groups=None` leaves it out.

nu is born in the backward pass. It leaves as the cotangent of the state's slot `nu`, which is defined to be its change;
`absorb_nu` adds it. Differentiate by parameters AND state, then absorb:

    (loss, state), (grads, change) = value_and_grad(f, (0, 1), has_aux=True)(params, state, x)
    state = absorb_nu(state, change)

Reconstructed: masked tokens take no part in any statistic and have neither output nor gradient (the official code
leaves them in the backward statistics); a batch without tokens changes no state. The code divides the gradient by
psi_B, the paper by psi: `denominator` chooses.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.norm.layer_norm import rms_norm
from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide, zero_where_false
from jaxlab.types import StatefulLayer


def power_norm(
    *,
    warmup_steps: int = 10000,
    groups: int | None = 1,
    momentum: float = 0.9,
    backward_momentum: float = 0.9,
    denominator: str = "running",
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> StatefulLayer:
    """Returns PowerNorm: `y = gain * x / sqrt(phi + eps) + bias` with a running mean square phi and its own backward.

    The gradient is the approximate one of the module's docstring, not the derivative of the output.

    Args:
        warmup_steps: steps at the beginning that divide by the batch's own mean square (the code's default is 10000;
            its translation models take the warm-up of their learning rate, 4000). 0 for none.
        groups: of features, each scaled by its token's root mean square beforehand; the number of attention heads in
            the paper's models. None leaves the scaling out.
        momentum: in [0, 1], of phi.
        backward_momentum: in [0, 1], of nu; 1 keeps nu at 0, which is PowerNorm without its correction.
        denominator: of the gradient: "running", what the forward divides by (the paper), or "batch" (the code).
        eps: > 0, inside the roots.
        axis_name: mapped axis over which the tokens are spread: statistics of all shards. nu's change is this shard's
            share; the sum over shards, which the gradient of a replicated state is, is the whole.

    Returns:
        A `StatefulLayer`: `params, state = init(key, size)`; `y, state = apply(params, state, x, where=None,
        train=False)` with x float `[..., size]` and `where` bool `[...]`, real tokens; the others come out as 0. The
        state holds `phi` and `nu`, float32 `[size]`, and `step`, float32 `[]` so that the whole can be differentiated;
        `apply` advances phi and step, `absorb_nu` nu. Gradients of several micro-batches are to be averaged, not added;
        under `vmap` of the loss the changes of nu add up.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> layer = power_norm(warmup_steps=0, groups=None)
        >>> params, state = layer.init(jax.random.key(0), 1)
        >>> loss = lambda p, s, x: (jnp.mean(layer.apply(p, s, x, train=True)[0] ** 2) / 2, s)
        >>> change, _ = jax.grad(loss, 1, has_aux=True)(params, state, jnp.array([[1.0], [3.0]]))
        >>> absorb_nu(state, change)["nu"].round(2).tolist()
        [0.25]

    Source:
        Shen et al., arXiv 2003.07845, algorithm 2; code sIncerass/powernorm (warm-up, groups, eps).
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
    if denominator not in ("running", "batch"):
        raise ValueError(f"denominator={denominator!r} must be 'running' or 'batch'")
    if not 0 <= backward_momentum <= 1:
        raise ValueError(f"backward_momentum={backward_momentum} must be between 0 and 1")
    _check_options(groups, momentum, eps)

    def init(key, size):
        del key
        _check_groups(groups, size)
        state = {"phi": jnp.ones(size), "nu": jnp.zeros(size), "step": jnp.zeros(())}
        return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}, state

    def apply(params, state, x, *, where=None, train=False):
        keep = _checked(params, x, where)
        wide = _scaled(zero_where_false(x, where).astype(compute_dtype(x)), groups, eps)
        phi = jax.lax.stop_gradient(state["phi"]).astype(wide.dtype)
        if not train:
            return _affine(wide * _row(jax.lax.rsqrt(phi + eps), x), params, where, x.dtype), state
        mean_square, count = _mean_square(jax.lax.stop_gradient(wide), keep, axis_name)
        mean_square = jnp.where(count > 0, mean_square, phi)
        step = jax.lax.stop_gradient(state["step"]) + (count > 0).astype(state["step"].dtype)
        batch, running = jax.lax.rsqrt(mean_square + eps), jax.lax.rsqrt(phi + eps)
        forward = jnp.where(step <= warmup_steps, batch, running)
        backward = batch if denominator == "batch" else forward
        nu = state["nu"].astype(wide.dtype)
        flat = wide.reshape(-1, wide.shape[-1])
        unit = _divide(*match_varying(flat, forward, backward, nu, count), 1.0 - backward_momentum)

        # Both updates happen while warming up, as in the code: the mean of all so far, then the moving average.
        t = jnp.maximum(step, 1.0).astype(wide.dtype)
        new = jnp.where(step < warmup_steps, phi * ((t - 1) / t) + mean_square / t, phi)
        new = jnp.where(count > 0, momentum * new + (1 - momentum) * mean_square, phi)
        new_state = {"phi": new.astype(state["phi"].dtype), "nu": jax.lax.stop_gradient(state["nu"]), "step": step}
        return _affine(unit.reshape(wide.shape), params, where, x.dtype), new_state

    return StatefulLayer(init, apply)


def absorb_nu(state: Any, change: Any) -> Any:
    """Returns the state with the change of nu that the backward pass reported: `nu <- nu + change`.

    Args:
        state: of a network, after `apply`: any pytree in which the states of `power_norm` layers stand somewhere.
        change: the gradient with respect to the state that went into `apply`, the same structure. Everything but the
            slots `nu` of PowerNorm is ignored.

    Example:
        >>> state = {"norm": {"phi": jnp.ones(1), "nu": jnp.ones(1), "step": jnp.ones(())}, "mean": jnp.ones(1)}
        >>> jax.tree.map(lambda a: a.item(), absorb_nu(state, state))
        {'mean': 1.0, 'norm': {'nu': 2.0, 'phi': 1.0, 'step': 1.0}}
    """

    def one(before, gradient):
        return {**before, "nu": before["nu"] + gradient["nu"]} if _is_power_norm(before) else before

    return jax.tree.map(one, state, change, is_leaf=_is_power_norm)


def power_norm_v(
    *, groups: int | None = 1, momentum: float = 0.9, eps: float = 1e-5, axis_name: str | None = None
) -> StatefulLayer:
    """Returns PowerNorm's plain variant PN-V: batch normalisation without the mean, with the exact gradient.

    Training: `y = gain * x / sqrt(psi_B^2 + eps) + bias`, and phi moves towards psi_B^2. Otherwise phi is used.

    Args:
        groups: as in `power_norm`.
        momentum: in [0, 1], of phi.
        eps: > 0, inside the root.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        A `StatefulLayer` called as `power_norm`'s; its state holds `phi` only.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> layer = power_norm_v(groups=None)
        >>> params, state = layer.init(jax.random.key(0), 1)
        >>> y, _ = layer.apply(params, state, jnp.array([[3.0], [-3.0]]), train=True)
        >>> y.round(2).tolist()
        [[1.0], [-1.0]]

    Source:
        Shen et al., arXiv 2003.07845, section 4.1.
    """
    _check_options(groups, momentum, eps)

    def init(key, size):
        del key
        _check_groups(groups, size)
        return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}, {"phi": jnp.ones(size)}

    def apply(params, state, x, *, where=None, train=False):
        keep = _checked(params, x, where)
        wide = _scaled(zero_where_false(x, where).astype(compute_dtype(x)), groups, eps)
        used = jax.lax.stop_gradient(state["phi"]).astype(wide.dtype)
        if train:
            mean_square, count = _mean_square(wide, keep, axis_name)
            used = jnp.where(count > 0, mean_square, used)
            moved = momentum * state["phi"] + (1 - momentum) * used.astype(state["phi"].dtype)
            state = {"phi": jax.lax.stop_gradient(moved)}
        return _affine(wide * _row(jax.lax.rsqrt(used + eps), x), params, where, x.dtype), state

    return StatefulLayer(init, apply)


def group_scaling(x: Array, groups: int = 1, *, eps: float = 1e-5) -> Array:
    """Returns every token with each group of its features divided by their root mean square.

    Args:
        x: float [..., C].
        groups: number of groups, which divides C.
        eps: inside the root.

    Raises:
        ValueError: `groups` does not divide C.

    Example:
        >>> group_scaling(jnp.array([2.0, 2.0, 8.0, 8.0]), 2, eps=0.0).tolist()
        [1.0, 1.0, 1.0, 1.0]

    Source:
        Code sIncerass/powernorm.
    """
    _check_groups(groups, x.shape[-1])
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return rms_norm(parts, eps=eps).reshape(x.shape)


def batch_statistic_distance(batch: Array, running: Array) -> Array:
    """Returns how far the statistics of one batch lie from the running ones: `||batch - running|| / C`.

    Args:
        batch: float [..., C], means, variances or mean squares of the features.
        running: float [..., C], the same of the whole training so far.

    Returns:
        float [...], in the dtype of `batch`.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> float(batch_statistic_distance(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0])))
        2.5

    Source:
        Shen et al., arXiv 2003.07845, section 3 (figure 2).
    """
    if batch.shape != running.shape or batch.ndim < 1:
        raise ValueError(f"batch {batch.shape} and running {running.shape} must have one shape [..., C]")
    dtype = compute_dtype(batch, running)
    square = jnp.sum(jnp.square(batch.astype(dtype) - running.astype(dtype)), axis=-1)
    root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return (root / batch.shape[-1]).astype(batch.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _divide(x: Array, forward: Array, backward: Array, nu: Array, count: Array, rate: float) -> Array:
    """Returns `x * forward` for x [T, C]; backward, nu and rate act in the backward pass only."""
    del backward, nu, count, rate
    return x * forward[None, :]


def _divide_forward(x, forward, backward, nu, count, rate):
    unit = _divide(x, forward, backward, nu, count, rate)
    return unit, (unit, backward, nu, count)


def _divide_backward(rate, residuals, g):
    unit, backward, nu, count = residuals
    pull = (g - nu[None, :] * unit) * backward[None, :]
    # This shard's share of (1 - a) (Lambda - nu Gamma): linear in its tokens, so that shares of all shards add up.
    number = jnp.maximum(count, 1.0)
    change = rate * (jnp.sum(g * unit, axis=0) - nu * jnp.sum(unit * unit, axis=0)) / number
    return pull, jnp.zeros_like(nu), jnp.zeros_like(nu), change, jnp.zeros_like(count)


_divide.defvjp(_divide_forward, _divide_backward)


def _mean_square(x: Array, keep: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Returns the mean square [C] over the kept tokens of all shards, and their number."""
    count = all_sum(jnp.sum(keep, dtype=x.dtype), axis_name)
    total = all_sum(masked_sum(x * x, keep, axis=tuple(range(x.ndim - 1))), axis_name)
    return safe_divide(total, count), count


def _scaled(x: Array, groups: int | None, eps: float) -> Array:
    return x if groups is None else group_scaling(x, groups, eps=eps)


def _affine(unit: Array, params: dict[str, Array], where: Array | None, dtype) -> Array:
    y = unit * _row(params["gain"].astype(unit.dtype), unit) + _row(params["bias"].astype(unit.dtype), unit)
    return zero_where_false(y, where).astype(dtype)


def _row(feature: Array, x: Array) -> Array:
    return feature.reshape((1,) * (x.ndim - 1) + feature.shape)


def _is_power_norm(state: Any) -> bool:
    return isinstance(state, dict) and set(state) == {"phi", "nu", "step"}


def _check_options(groups: int | None, momentum: float, eps: float) -> None:
    if groups is not None and groups < 1:
        raise ValueError(f"groups={groups} must be at least 1")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be between 0 and 1")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")


def _check_groups(groups: int | None, size: int) -> None:
    if groups is not None and (groups < 1 or size % groups):
        raise ValueError(f"groups={groups} must divide the {size} features")


def _checked(params: dict[str, Array], x: Array, where: Array | None) -> Array:
    if x.ndim < 2 or params["gain"].shape != x.shape[-1:]:
        raise ValueError(f"x has shape {x.shape}, expected [..., {params['gain'].shape[0]}] with leading axes")
    if where is not None and where.shape != x.shape[:-1]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:-1]}, the leading dims of x")
    return jnp.ones(x.shape[:-1], bool) if where is None else where
