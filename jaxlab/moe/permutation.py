"""Permutation-based local search over the experts of any router (COMET+, arXiv 2306.02824, section 4).

Which expert a router's output e stands for is arbitrary, and first-order methods rarely get out of a bad choice. So a
permutation is learnt beside the router for the first steps of training, as the Sinkhorn limit of free logits L,

    M = Sinkhorn(L / tau, n),    tau from 1e-3 down to 1e-7 (log-linear),    n from 20 up to 150 iterations (linear),

the router's weights become `w M / sum(w M)`, the entropy of M is added to the loss, and at the end of the stage M is
rounded to the permutation with the largest sum of its entries, for good.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.plans import GatePlan, dense_weights, plan_from_weights
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.masked import compute_dtype, safe_divide
from jaxlab.ops.transport import gumbel_sinkhorn
from jaxlab.types import Layer, RoutingPlan, StatefulLayer, accepted

_TAU, _ITERATIONS = (1e-3, 1e-7), (20, 150)


def permutation_search(
    router: Layer,
    num_experts: int,
    *,
    steps: int,
    num_permutations: int = 1,
    noise: float = 0.0,
    max_active: int | None = None,
) -> StatefulLayer:
    """Returns a router that also learns which expert each output of `router` stands for (COMET+, Top-k+, Hash+, ...).

    In training, before `steps` optimiser steps are done, its weights go through soft permutations that follow
    `permutation_schedule`; afterwards, and in evaluation, through the hard ones in its state. Add
    `reg * permutation_entropy(plan.permutations)` to the loss, and call `update_permutations` once per optimiser step.

    Args:
        router: a `Layer` whose `apply` gives a `RoutingPlan`.
        num_experts: E, that of `router`.
        steps: length of the search in optimiser steps.
        num_permutations: 1 for one that all share, or S for one for each selector of a `GatePlan` router (COMET: k).
        noise: factor of the Gumbel noise on the logits in the search; needs `key` in training.
        max_active: as in `permute_plan`.

    Returns:
        A `StatefulLayer`. `init(key, d)`: parameters `router` and `permutation`, float32 [K, E, E] ~ U(-0.05, 0.05),
        and the state `{step: int32, steps: int32, columns: int32 [K, E]}`. `apply(params, state, x, key=None,
        train=False, ...)` passes on what `router` takes, and gives a `GatePlan` and the state unchanged.

    Raises:
        ValueError: an option is out of range, or noise is asked for in training without a key.

    Example:
        >>> from jaxlab import moe
        >>> router = permutation_search(moe.comet_gate(4, 2), 4, steps=100)
        >>> def first_step(key):
        ...     params, state = router.init(key, 2)
        ...     plan, _ = router.apply(params, state, jnp.ones((3, 2)), train=True)
        ...     return plan.scores, update_permutations(params, state)
        >>> scores, state = jax.eval_shape(first_step, jax.random.key(0))
        >>> scores.shape, sorted(state)
        ((3, 4), ['columns', 'step', 'steps'])

    Source:
        Ibrahim et al., arXiv 2306.02824, section 4; official TensorFlow code (schedules, noise, entropy).
        Reconstructed: the rounding uses M without noise, and breaks its ties by the logits.
    """
    if num_experts < 1 or num_permutations < 1:
        raise ValueError(f"num_experts={num_experts} and num_permutations={num_permutations} must be at least 1")
    if steps < 0 or noise < 0:
        raise ValueError(f"steps={steps} and noise={noise} must not be negative")
    shape = (num_permutations, num_experts, num_experts)

    def init(key, *dims):
        key_router, key_logits = jax.random.split(key)
        logits = jax.random.uniform(key_logits, shape, minval=-0.05, maxval=0.05)
        state = {
            "step": jnp.zeros((), jnp.int32),
            "steps": jnp.full((), steps, jnp.int32),
            "columns": jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), shape[:2]),
        }
        return {"router": router.init(key_router, *dims), "permutation": logits}, state

    def apply(params, state, x, *, key=None, train=False, **inputs):
        if train and noise and key is None:
            raise ValueError("key is needed: this search is noisy in training")
        key_router, key_noise = (None, None) if key is None else jax.random.split(key)
        plan = router.apply(params["router"], x, **accepted(router.apply, key=key_router, train=train), **inputs)
        logits = params["permutation"].astype(plan.weight.dtype)
        permutations = jax.nn.one_hot(state["columns"], num_experts, dtype=logits.dtype)
        if train and steps:
            soft = _soft(logits, state, noise, key_noise if noise else None)
            permutations = jnp.where(state["step"] < state["steps"], soft, permutations)
        return permute_plan(plan, permutations, max_active=max_active), state

    return StatefulLayer(init, apply)


def update_permutations(params: dict, state: dict) -> dict:
    """Returns the state of `permutation_search` after one optimiser step.

    Counts the step and, while the search lasts, stores the hard permutations of the current logits.

    Args:
        params: of `permutation_search`, after the step.
        state: of `permutation_search`.

    Returns:
        The new state; `columns` no longer change once `steps` steps are done.

    Example:
        >>> logits = jnp.array([[[0.0, 0.01], [0.01, 0.0]]])
        >>> state = {"step": jnp.int32(0), "steps": jnp.int32(9), "columns": jnp.array([[0, 1]], jnp.int32)}
        >>> jax.jit(update_permutations)({"permutation": logits}, state)["columns"].tolist()
        [[1, 0]]
    """
    logits = params["permutation"]
    # Cold Sinkhorn has entries of exactly 0 and 1, and where it has not converged, ties: the logits decide them.
    scores = _soft(logits, state, 0.0, None) + 1e-3 * logits
    columns = jnp.where(state["step"] < state["steps"], linear_assignment(scores, maximize=True), state["columns"])
    return {**state, "step": state["step"] + 1, "columns": columns}


def permutation_schedule(step: Array | int, steps: Array | int) -> tuple[Array, Array]:
    """Returns temperature and number of Sinkhorn iterations at a step of the search.

    `tau = 10^(-3 - 4 r)` and `n = floor(20 + 130 r)` with `r = step / steps`, held at its ends.

    Args:
        step: int or int array [].
        steps: length of the search, > 0 (0 counts as over).

    Returns:
        `tau` float32 [] and `n` int32 [].

    Example:
        >>> tau, n = jax.jit(lambda step: permutation_schedule(step, 100))(50)
        >>> f"{float(tau):.0e}", int(n)
        ('1e-05', 85)

    Source:
        Official code of COMET, arXiv 2306.02824.
    """
    done = jnp.asarray(step, jnp.float32) / jnp.maximum(jnp.asarray(steps, jnp.float32), 1.0)
    done = jnp.clip(done, 0.0, 1.0)
    first, last = (jnp.log10(jnp.float32(tau)) for tau in _TAU)
    iterations = _ITERATIONS[0] + (_ITERATIONS[1] - _ITERATIONS[0]) * done
    return 10.0 ** (first + (last - first) * done), iterations.astype(jnp.int32)


def permutation_entropy(permutations: Array, *, eps: float = 1e-6) -> Array:
    """Returns the entropy of soft permutations plus that of their normalised rows; 0 for hard ones.

    `mean_k [sum -M log(M + eps) + sum -N log(N + eps)]`, N = M with rows divided by their sums.

    Args:
        permutations: float >= 0 [K, E, E] or [E, E].
        eps: > 0, inside the logarithm.

    Returns:
        Scalar in the dtype of accumulation.

    Raises:
        ValueError: the last two axes differ, or `eps` is not positive.

    Example:
        >>> abs(round(float(jax.jit(permutation_entropy)(jnp.eye(3))), 4))
        0.0
    """
    if permutations.ndim < 2 or permutations.shape[-1] != permutations.shape[-2]:
        raise ValueError(f"permutations must be [K, E, E], got shape {permutations.shape}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    soft = permutations.astype(compute_dtype(permutations))
    rows = safe_divide(soft, jnp.broadcast_to(jnp.sum(soft, axis=-1, keepdims=True), soft.shape))
    return sum(jnp.mean(jnp.sum(-m * jnp.log(m + eps), axis=(-2, -1))) for m in (soft, rows))


def hard_permutation(permutations: Array) -> Array:
    """Returns the permutation matrix whose entries of a soft permutation have the largest sum; no gradient.

    Args:
        permutations: float [..., E, E], soft permutations or any scores.

    Returns:
        [..., E, E] of zeros and ones in the dtype of `permutations`.

    Example:
        >>> jax.jit(hard_permutation)(jnp.array([[0.4, 0.6], [0.5, 0.5]])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    if permutations.ndim < 2 or permutations.shape[-1] != permutations.shape[-2]:
        raise ValueError(f"permutations must be [..., E, E], got shape {permutations.shape}")
    columns = linear_assignment(permutations, maximize=True)
    return jax.nn.one_hot(columns, permutations.shape[-1], dtype=permutations.dtype)


def permute_plan(plan: RoutingPlan, permutations: Array, *, max_active: int | None = None) -> GatePlan:
    """Returns the plan in which output l of the router goes to expert e with share `permutations[l, e]`.

    `w_e = sum_s sum_l g_sl Pi_s[l, e]`, divided by its sum over e.

    Args:
        plan: any routing plan; of a `GatePlan` the gates g [T, S, E] are permuted, of another its weights (S = 1).
        permutations: float >= 0 [K, E, E] or [E, E]: one for all selectors, or one for each of S; where S = 1, their
            mean.
        max_active: room for each token in the new plan; None = E, since soft permutations reach every expert.

    Returns:
        A `GatePlan`: gates and logits as they were, weights and scores after the permutation.

    Raises:
        ValueError: shapes do not fit, or `max_active` is out of range.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> run = lambda w, p: dense_weights(permute_plan(plan_from_weights(w), p))
        >>> jax.jit(run)(jnp.array([[1.0, 0.0], [0.25, 0.75]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])).tolist()
        [[0.0, 1.0], [0.75, 0.25]]
    """
    experts = plan.num_experts
    permutations = permutations[None] if permutations.ndim == 2 else permutations
    gates = plan.gates if isinstance(plan, GatePlan) else dense_weights(plan)[:, None, :]
    selectors = plan.selectors if isinstance(plan, GatePlan) else gates
    count = gates.shape[1]
    if permutations.shape[1:] != (experts, experts) or (count > 1 and permutations.shape[0] not in (1, count)):
        raise ValueError(
            f"permutations has shape {permutations.shape}, expected [{experts}, {experts}], or one for each of the "
            f"{count} selectors"
        )
    applied = permutations.astype(gates.dtype)
    one = jnp.mean(applied, axis=0) if count == 1 or permutations.shape[0] == 1 else None
    precision = jax.lax.Precision.HIGHEST
    if one is None:
        weights = jnp.einsum("tsl,sle->te", gates, applied, precision=precision)
    else:
        weights = jnp.einsum("tl,le->te", jnp.sum(gates, axis=1), one, precision=precision)
    weights = safe_divide(weights, jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True), weights.shape))
    new = plan_from_weights(weights, plan.logits, max_active=max_active)
    scores = weights if isinstance(plan, GatePlan) else jnp.matmul(plan.scores, one, precision=precision)
    return GatePlan(
        token=new.token,
        expert=new.expert,
        weight=new.weight,
        counts=new.counts,
        scores=scores,
        logits=plan.logits,
        dropped=plan.dropped + new.dropped,
        gates=gates,
        selectors=selectors,
        permutations=permutations,
    )


def _soft(logits: Array, state: dict, noise: float, key: Array | None) -> Array:
    temperature, iterations = permutation_schedule(state["step"], state["steps"])
    return gumbel_sinkhorn(
        logits, temperature=temperature, iterations=iterations, noise=noise, key=key, max_iterations=_ITERATIONS[1]
    )
