"""From gates to plans: dense matrices of expert weights become routing plans, and plans become dense again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.top_k_routing import TopK, plan_from_top_k
from jaxlab.ops.collectives import global_mean, match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatePlan(RoutingPlan):
    """A routing plan made of S selectors a token, with what their regularisers and a permutation read.

    Attributes:
        gates: float32 [T, S, E], the weight that each selector gives each expert; the plan's weights are their sum.
        selectors: float32 [T, S, E], the probability with which each selector picks each expert (COMET's trees,
            DSelect-k's binary codes); exactly 0 and 1 once a selector has settled.
        permutations: float32 [K, E, E], what has been applied to the gates (`permute_plan`), or None.
    """

    gates: Array
    selectors: Array
    permutations: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """A soft plan: every slot of an expert is a mean of all tokens, every token's output a mean of all slots.

    Attributes:
        dispatch: float32 [T, E, S], weights of the tokens in each slot; sum to 1 over T.
        combine: float32 [T, E, S], weights of the slots in each token's output; sum to 1 over E and S.
        logits: float32 [T, E, S], what both are a softmax of.
        where: bool [T], tokens that exist.
    """

    dispatch: Array
    combine: Array
    logits: Array
    where: Array

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.dispatch.shape[-2]


def plan_from_weights(
    weights: Array, logits: Array | None = None, *, max_active: int | None = None, where: Array | None = None
) -> RoutingPlan:
    """Returns the routing plan of a dense matrix of weights: one assignment for each that is above 0.

    A = T `max_active` assignments are room for the `max_active` largest weights of each token. Weights of 0 (and NaN)
    take no row and cost nothing; positive ones beyond the room are cut, unchanged the rest, and counted in `dropped`.

    Args:
        weights: float [T, E], >= 0; also the plan's `scores`.
        logits: float [T, E], for the z-loss; None = the weights' logarithms, at least that of the smallest number.
        max_active: room for each token, 1 to E; None = E, which cuts nothing.
        where: bool [T], tokens that exist.

    Returns:
        A `RoutingPlan`, differentiable in `weight`, `scores` and `logits`.

    Raises:
        ValueError: a shape does not fit, or `max_active` is out of range.

    Example:
        >>> plan = jax.jit(lambda w: plan_from_weights(w, max_active=2))(jnp.array([[0.0, 0.7, 0.3], [1.0, 0.0, 0.0]]))
        >>> plan.expert.tolist(), plan.token.tolist()[:3], plan.counts.tolist()
        ([0, 1, 2, 3], [1, 0, 0], [1, 1, 1])
    """
    if weights.ndim != 2:
        raise ValueError(f"weights must be [tokens, experts], got shape {weights.shape}")
    tokens, experts = weights.shape
    room = experts if max_active is None else max_active
    if not 1 <= room <= experts:
        raise ValueError(f"max_active={max_active} must be between 1 and num_experts={experts}")
    if where is not None and where.shape != (tokens,):
        raise ValueError(f"where has shape {where.shape}, expected ({tokens},)")
    if logits is not None and logits.shape != weights.shape:
        raise ValueError(f"logits has shape {logits.shape}, expected {weights.shape}")
    dtype = compute_dtype(weights)
    weights = weights.astype(dtype)
    usable = weights > 0 if where is None else (weights > 0) & where[:, None]
    weights = jnp.where(usable, weights, jnp.zeros((), dtype))
    if logits is None:
        logits = jnp.log(jnp.maximum(weights, jnp.finfo(dtype).tiny))
    return rows_mixed(_plan)(weights, logits, room=room)


def plan_from_ids(
    ids: Array,
    weights: Array,
    probs: Array,
    logits: Array,
    *,
    where: Array | None = None,
) -> RoutingPlan:
    """Returns the routing plan of a choice that is known: each token's k experts and their weights.

    Args:
        ids: int [T, k], distinct in each row; whatever is not in 0 .. E - 1 is no assignment.
        weights: float >= 0 [T, k].
        probs: float [T, E], the plan's `scores`.
        logits: float [T, E], for the z-loss.
        where: bool [T], tokens that exist.

    Returns:
        A `RoutingPlan` of A = T k assignments; nothing is dropped.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> probs = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> jax.jit(plan_from_ids)(jnp.array([[1], [0]]), jnp.ones((2, 1)), probs, probs).token.tolist()
        [1, 0]
    """
    if ids.ndim != 2 or weights.shape != ids.shape:
        raise ValueError(f"ids and weights must be [T, k], got {ids.shape} and {weights.shape}")
    if probs.ndim != 2 or probs.shape[0] != ids.shape[0] or logits.shape != probs.shape:
        raise ValueError(f"probs and logits must be [{ids.shape[0]}, E], got {probs.shape} and {logits.shape}")
    keep = jnp.ones(ids.shape[0], bool) if where is None else where
    if keep.shape != ids.shape[:1]:
        raise ValueError(f"where has shape {keep.shape}, expected {ids.shape[:1]}")
    return rows_mixed(_plan_of_ids)(*match_varying(ids, weights, probs, logits, keep))


def plan_from_gates(
    gates: Array,
    selectors: Array,
    logits: Array | None = None,
    *,
    max_active: int | None = None,
    where: Array | None = None,
) -> GatePlan:
    """Returns the plan of S selectors for each token, whose gates add up.

    Args:
        gates: float >= 0 [T, S, E].
        selectors: float [T, S, E], probabilities.
        logits: float [T, E], as in `plan_from_weights`.
        max_active: as in `plan_from_weights`.
        where: bool [T], tokens that exist; `gates` and `selectors` of the others become 0.

    Returns:
        A `GatePlan` without permutations.

    Raises:
        ValueError: a shape does not fit, or `max_active` is out of range.

    Example:
        >>> gates = jnp.array([[[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]]])
        >>> jax.jit(lambda gates: plan_from_gates(gates, 2 * gates))(gates).counts.tolist()
        [1, 0, 1]
    """
    if gates.ndim != 3 or selectors.shape != gates.shape:
        raise ValueError(f"gates and selectors must be [T, S, E], got {gates.shape} and {selectors.shape}")
    if where is not None and where.shape == gates.shape[:1]:
        gates, selectors = (jnp.where(where[:, None, None], a, jnp.zeros((), a.dtype)) for a in (gates, selectors))
    plan = plan_from_weights(jnp.sum(gates, axis=1), logits, max_active=max_active, where=where)
    return GatePlan(**_fields(plan), gates=gates, selectors=selectors)


def dense_weights(plan: RoutingPlan) -> Array:
    """Returns the plan's weights as a matrix [T, E], 0 where a token does not go to an expert.

    Args:
        plan: a routing plan of T tokens and E experts.

    Returns:
        [T, E] in the dtype of `plan.weight`; differentiable.

    Example:
        >>> jax.jit(lambda w: dense_weights(plan_from_weights(w)))(jnp.array([[0.0, 1.0], [0.25, 0.75]])).tolist()
        [[0.0, 1.0], [0.25, 0.75]]
    """
    return rows_mixed(_dense)(*match_varying(plan.token, plan.expert, plan.weight, plan.scores))


def selector_entropy(
    plan: GatePlan, *, where: Array | None = None, eps: float = 1e-6, axis_name: str | None = None
) -> Array:
    """Returns the mean over tokens of the summed entropy of their selectors; 0 once each picks one expert.

    `mean_t sum_s sum_e -p log(p + eps)` with `p = plan.selectors[t, s, e]`. Added to the loss it makes the gates of
    COMET and DSelect-k settle on their k experts.

    Args:
        plan: a `GatePlan`, of `comet_gate` or `dselect_k_router`.
        where: bool [T], tokens that exist.
        eps: > 0, inside the logarithm.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 without tokens.

    Raises:
        ValueError: the plan has no selectors, or `eps` is not positive.

    Example:
        >>> sure = jnp.array([[[1.0, 0.0]]])
        >>> abs(round(float(jax.jit(lambda s: selector_entropy(plan_from_gates(s, s)))(sure)), 4))
        0.0

    Source:
        Hazimeh et al., DSelect-k, arXiv 2106.03760, section 3.2, and Ibrahim et al., COMET, arXiv 2306.02824, section
        3.2, with the mean over tokens of the latter's code (DSelect-k's code sums over the batch).
    """
    if not isinstance(plan, GatePlan):
        raise ValueError(f"plan must be a GatePlan, which has selectors, got {type(plan).__name__}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    p = plan.selectors
    keep = jnp.ones(p.shape[0], bool) if where is None else where
    p = jnp.where(keep[:, None, None], p, jnp.zeros((), p.dtype))
    return global_mean(jnp.sum(-p * jnp.log(p + eps), axis=(1, 2)), keep, axis_name=axis_name)


def _plan(weights: Array, logits: Array, *, room: int) -> RoutingPlan:
    experts = weights.shape[1]
    kept, ids = jax.lax.top_k(weights, room)
    used = kept > 0
    ids = jnp.where(used, ids, experts).astype(jnp.int32)
    flat = ids.reshape(-1)
    counts = match_varying(jnp.zeros(experts, jnp.int32), flat)[0].at[flat].add(1, mode="drop")
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    plan = plan_from_top_k(TopK(ids, jnp.where(used, kept, 0.0), counts, order, weights), logits)
    dropped = jnp.sum(weights > 0, dtype=jnp.int32) - jnp.sum(used, dtype=jnp.int32)
    return dataclasses.replace(plan, dropped=dropped)


def _plan_of_ids(ids, weights, probs, logits, keep) -> RoutingPlan:
    experts, dtype = probs.shape[1], compute_dtype(logits)
    real = (ids >= 0) & (ids < experts) & keep[:, None]
    ids = jnp.where(real, ids, experts).astype(jnp.int32)
    weights = jnp.where(real, weights, jnp.zeros((), weights.dtype)).astype(dtype)
    probs, logits = (jnp.where(keep[:, None], a, jnp.zeros((), a.dtype)).astype(dtype) for a in (probs, logits))
    flat = ids.reshape(-1)
    counts = match_varying(jnp.zeros(experts, jnp.int32), flat)[0].at[flat].add(1, mode="drop")
    return plan_from_top_k(TopK(ids, weights, counts, jnp.argsort(flat, stable=True).astype(jnp.int32), probs), logits)


def _dense(token: Array, expert: Array, weight: Array, scores: Array) -> Array:
    zeros = match_varying(jnp.zeros(scores.shape, weight.dtype), weight)[0]
    return zeros.at[token, expert].add(weight, mode="drop")


def _fields(plan: RoutingPlan) -> dict[str, Array]:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(RoutingPlan)}
