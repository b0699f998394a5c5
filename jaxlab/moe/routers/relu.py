"""The router of ReMoE, with its sparsity penalty and the coefficient that holds the mean number of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.plans import plan_from_weights
from jaxlab.moe.routers._linear import clean_tokens, linear, linear_init
from jaxlab.ops.collectives import all_sum, global_mean
from jaxlab.ops.masked import safe_divide
from jaxlab.types import Layer, RoutingPlan


def relu_router(num_experts: int, *, max_active: int | None = None) -> Layer:
    """Returns the router of ReMoE: `w = relu(x w)`, sparse and differentiable, with as many experts as a token needs.

    Add `coefficient * relu_penalty(plan, k=k)` to the loss, and let `update_relu_coefficient` hold the mean number of
    active experts at k.

    Args:
        num_experts: E.
        max_active: room of the plan for each token, as in `comet_gate`; None = E.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None)` gives a `RoutingPlan` of A = T `max_active`
        assignments, of which those of weight 0 are unused; `plan.scores` are all weights, including those cut.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> router = relu_router(3)
        >>> jax.jit(router.apply)({"w": jnp.array([[1.0, -1.0, 2.0]])}, jnp.ones((2, 1))).counts.tolist()
        [2, 0, 2]

    Source:
        Wang et al., ReMoE, arXiv 2412.14711, section 3.
    """
    if max_active is not None and not 1 <= max_active <= num_experts:
        raise ValueError(f"max_active={max_active} must be between 1 and num_experts={num_experts}")

    def apply(params, x, *, where=None):
        logits = linear(params, clean_tokens(x, where))
        return plan_from_weights(jax.nn.relu(logits), logits, max_active=max_active, where=where)

    return Layer(linear_init(num_experts), apply)


def relu_penalty(plan: RoutingPlan, *, k: float, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns ReMoE's sparsity penalty, heavier on busy experts: `mean_t sum_e f_e w_te`.

    `f_e = E / (k T) * number of tokens with w_te > 0` (a constant), 1 where each expert is active for k T / E tokens.

    Args:
        plan: of `relu_router`.
        k: > 0, wanted mean number of active experts.
        where: bool [T], tokens that exist.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 without tokens.

    Raises:
        ValueError: `k` is not positive.

    Example:
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> float(jax.jit(lambda x: relu_penalty(relu_router(2).apply(params, x), k=1))(jnp.ones((4, 1))))
        2.0

    Source:
        Wang et al., ReMoE, arXiv 2412.14711, eq. 8 and 9 (for one layer).
    """
    if not k > 0:
        raise ValueError(f"k={k} must be positive")
    keep = jnp.ones(plan.scores.shape[0], bool) if where is None else where
    weights = jnp.where(keep[:, None], plan.scores, jnp.zeros((), plan.scores.dtype))
    active = all_sum(jnp.sum(weights > 0, axis=0, dtype=weights.dtype), axis_name)
    tokens = all_sum(jnp.sum(keep, dtype=weights.dtype), axis_name)
    share = jax.lax.stop_gradient(safe_divide(active * (plan.num_experts / k), tokens[None]))
    return global_mean(jnp.sum(share[None, :] * weights, axis=1), keep, axis_name=axis_name)


def update_relu_coefficient(
    coefficient: Array,
    plan: RoutingPlan,
    *,
    k: float,
    factor: float = 1.2,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the coefficient of `relu_penalty` after one optimiser step: up while more than k experts are active.

    `coefficient * factor^sign(mean number of active experts - k)`.

    Args:
        coefficient: float [], starts at 1e-8 in the paper.
        plan: of `relu_router`.
        k: > 0, wanted mean number of active experts.
        factor: > 1.
        where: bool [T], tokens that exist.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        Float [] in the dtype of `coefficient`; unchanged without tokens.

    Raises:
        ValueError: `k` is not positive or `factor` not above 1.

    Example:
        >>> plan_of = lambda x: relu_router(2).apply({"w": jnp.array([[1.0, 2.0]])}, x)
        >>> step = jax.jit(lambda c, x: update_relu_coefficient(c, plan_of(x), k=1))
        >>> round(float(step(jnp.float32(1.0), jnp.ones((4, 1)))), 4)
        1.2

    Source:
        Wang et al., ReMoE, arXiv 2412.14711, eq. 7.
    """
    if not k > 0 or not factor > 1:
        raise ValueError(f"k={k} must be positive and factor={factor} above 1")
    keep = jnp.ones(plan.scores.shape[0], bool) if where is None else where
    active = jnp.sum(jax.lax.stop_gradient(plan.scores) > 0, axis=1).astype(coefficient.dtype)
    excess = global_mean(active - k, keep, axis_name=axis_name)
    return (coefficient * factor ** jnp.sign(excess)).astype(coefficient.dtype)
