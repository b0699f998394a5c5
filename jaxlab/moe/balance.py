"""Balance losses and load metrics of a routing plan; none of them builds a [T, E, C] one-hot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, global_mean, match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan


def expert_load(plan: RoutingPlan, *, axis_name: str | None = None) -> Array:
    """Returns the share of assignments of each expert times E: 1 is ideal, 0 a dead expert.

    Args:
        plan: a routing plan.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        float32 [E]; all 0 for a plan without assignments.
    """
    counts = all_sum(jax.lax.stop_gradient(plan.counts).astype(jnp.float32), axis_name)
    return safe_divide(counts * plan.num_experts, jnp.sum(counts, keepdims=True))


def load_balancing_loss(plan: RoutingPlan, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the load-balancing loss `E * sum_e f_e P_e` of Switch Transformers.

    f_e is the share of assignments that expert e receives (a constant), P_e the mean router probability of e; the
    loss is 1 when both are uniform. With `axis_name` both are taken over the global batch.

    Args:
        plan: a routing plan with `scores` float [T, E] that are probabilities.
        where: bool [T], real tokens; padded ones must not be counted in the plan either.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        float32 scalar; 0 without tokens.

    Example:
        >>> from jaxlab.moe import top_k_router
        >>> router = top_k_router(4, 1)
        >>> loss = jax.jit(lambda x: load_balancing_loss(router.apply({"w": jnp.zeros((2, 4))}, x)))
        >>> round(float(loss(jnp.ones((3, 2)))), 4)
        1.0

    Source:
        Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961, eq. 4 (divided by k for k > 1).
    """
    keep = jnp.ones(plan.scores.shape[0], bool) if where is None else where
    total = all_sum(jnp.sum(jnp.where(keep[:, None], plan.scores, 0.0), axis=0), axis_name)
    count = all_sum(jnp.sum(keep, dtype=jnp.float32), axis_name)
    mean_probability = safe_divide(total, count[None])
    return jnp.sum(expert_load(plan, axis_name=axis_name) * mean_probability)


def importance_loss(plan: RoutingPlan, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the squared coefficient of variation of the experts' summed weights, `Var(I) / Mean(I)^2`.

    `I_e` is the sum of the plan's weights of expert e, so that gradient goes through the weights. Variance over E.

    Args:
        plan: a routing plan.
        where: bool [T], real tokens; None = all that the plan routes.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 for a plan without weight, and for one expert.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> float(jax.jit(lambda w: importance_loss(plan_from_weights(w)))(jnp.array([[1.0, 0.0]])))
        1.0

    Source:
        Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538, section 4 (before its weight).
    """
    weight = plan.weight if where is None else jnp.where(where[plan.token], plan.weight, jnp.zeros_like(plan.weight))
    zeros = match_varying(jnp.zeros(plan.num_experts, weight.dtype), weight)[0]
    return squared_variation(all_sum(zeros.at[plan.expert].add(weight, mode="drop"), axis_name))


def squared_variation(x: Array, *, ddof: int = 0, eps: float = 0.0) -> Array:
    """Returns `Var(x) / (Mean(x)^2 + eps)` of a vector; 0 for one entry or a mean of 0.

    Args:
        x: float [E].
        ddof: 0 divides the variance by E, 1 by E - 1.
        eps: >= 0.

    Raises:
        ValueError: `x` is not a vector.

    Example:
        >>> float(jax.jit(squared_variation)(jnp.array([0.0, 2.0])))
        1.0
    """
    if x.ndim != 1:
        raise ValueError(f"x must be [E], got shape {x.shape}")
    dtype = x.dtype
    x = x.astype(compute_dtype(x))
    if x.shape[0] <= max(1, ddof):
        return jnp.zeros((), dtype)
    # Divided by the largest first, so that the square of a mean neither overflows nor vanishes.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), keepdims=True))
    unit = safe_divide(x, largest)
    mean = jnp.mean(unit, keepdims=True)
    variance = jnp.sum((unit - mean) ** 2) / (x.shape[0] - ddof)
    scaled = safe_divide(jnp.asarray(eps, x.dtype), largest[0] ** 2) if eps > 0 else jnp.zeros((), x.dtype)
    return safe_divide(variance, mean[0] ** 2 + scaled).astype(dtype)


def mutual_information_loss(
    plan: RoutingPlan, labels: Array, num_labels: int, *, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns minus the mutual information of a token's task (or field) and the expert that its router likes.

    `-sum_me P_me log(P_me / (P_m P_e))` with `P_me` the share of all scores that tokens of task m give to expert e:
    lower where every task has experts of its own, and all of them are used.

    Args:
        plan: a routing plan with `scores` >= 0 [T, E].
        labels: int [T] in 0 .. M - 1, the task of each token; others are left out.
        num_labels: M.
        where: bool [T], real tokens.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        Scalar in the dtype of accumulation, from -log(min(M, E)) to 0; 0 without tokens.

    Raises:
        ValueError: a shape does not fit or `num_labels` is less than 1.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> loss = jax.jit(lambda w, labels: mutual_information_loss(plan_from_weights(w), labels, 2))
        >>> round(float(loss(jnp.eye(2), jnp.array([0, 1]))), 4)
        -0.6931

    Source:
        Chen et al., Mod-Squad, arXiv 2212.08066, section 3.2. Of the batch alone, where the code keeps a history.
    """
    if labels.shape != plan.scores.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {plan.scores.shape[:1]}")
    if num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1")
    keep = (labels >= 0) & (labels < num_labels)
    keep = keep if where is None else keep & where
    scores = jnp.where(keep[:, None], plan.scores, jnp.zeros((), plan.scores.dtype))
    zeros = match_varying(jnp.zeros((num_labels, plan.num_experts), scores.dtype), scores)[0]
    add = lambda zeros, scores, target: zeros.at[target].add(scores, mode="drop")
    mass = all_sum(rows_mixed(add)(zeros, scores, jnp.where(keep, labels, num_labels)), axis_name)
    p = safe_divide(mass, jnp.broadcast_to(jnp.sum(mass), mass.shape))
    independent = jnp.sum(p, axis=1, keepdims=True) * jnp.sum(p, axis=0, keepdims=True)
    some = p > 0
    log_ratio = jnp.log(jnp.where(some, p, 1.0)) - jnp.log(jnp.where(some, independent, 1.0))
    return -jnp.sum(p * log_ratio)


def router_z_loss(plan: RoutingPlan, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the mean over tokens of `logsumexp(logits)^2`, which keeps router logits small.

    Args:
        plan: a routing plan with `logits` float [T, E].
        where: bool [T], real tokens.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        float32 scalar; 0 without tokens.

    Source:
        Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.
    """
    keep = jnp.ones(plan.logits.shape[0], bool) if where is None else where
    logits = jnp.where(keep[:, None], plan.logits, 0.0)
    return global_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, keep, axis_name=axis_name)
