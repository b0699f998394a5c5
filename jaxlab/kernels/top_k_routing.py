"""Router scores to the k experts of each token, and the order in which experts want their tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels._select import choose
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan

SCORE_FUNCTIONS = ("softmax", "sigmoid", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The k experts of each of T tokens.

    Attributes:
        ids: int32 [T, k], the chosen experts; `num_experts` for tokens that `where` leaves out.
        weights: float32 [T, k], their weights.
        counts: int32 [E], how often each expert was chosen.
        order: int32 [T * k], positions in the flattened `ids`, stably sorted by expert.
        probs: float32 [T, E], scores after the score function; 0 where a score was NaN or a token is left out.
    """

    ids: Array
    weights: Array
    counts: Array
    order: Array
    probs: Array

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.counts.shape[-1]


def top_k_routing(
    scores: Array,
    k: int,
    *,
    bias: Array | None = None,
    groups: int | None = None,
    groups_kept: int | None = None,
    per_group: bool = False,
    renormalize: bool = False,
    score_function: str = "softmax",
    where: Array | None = None,
    implementation: str = "auto",
) -> TopK:
    """Returns the k best experts of each token with weights, counts and the stable order by expert.

    `p = score_function(scores)`; `ids` are the k largest of `p + bias` (of `scores` without a bias, so that saturated p
    do not tie); `weights = p[ids]`, divided by their sum if `renormalize`. Ties go to the lowest id. NaN ranks below
    everything and has weight and gradient 0; infinite scores count as the largest finite ones. The choice itself has no
    gradient; `weights` and `probs` do.

    Args:
        scores: [T, E], floating; arithmetic is float32 (float64 for float64 scores).
        k: experts per token, 1 to E.
        bias: [E], added for the choice only; carries no gradient.
        groups: number of equal groups of neighbouring experts; needs `groups_kept` or `per_group`.
        groups_kept: choose only within the best groups of each token, by the sum of their two largest `p + bias`
            (DeepSeek-V3).
        per_group: choose k / groups experts in each group (MoGE).
        renormalize: whether the weights of a token sum to 1 (0 where the sum is 0).
        score_function: "softmax", "sigmoid" or "none" (scores are used as they come).
        where: bool [T], True = real token. Others get ids E and weights exactly 0, are not counted and sort last.
        implementation: "auto", "reference" or "xla".

    Returns:
        A `TopK`; ids of a token are in falling order of preference.

    Raises:
        ValueError: k, the groups, a shape or a name is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> chosen = top_k_routing(jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]), 2, renormalize=True)
        >>> chosen.ids.tolist(), chosen.counts.tolist(), chosen.order.tolist()
        ([[1, 2], [0, 2]], [1, 1, 2], [2, 0, 1, 3])
    """
    chosen = choose("top_k_routing", implementation, ("reference", "xla"))
    if scores.ndim != 2:
        raise ValueError(f"scores must be [tokens, experts], got shape {scores.shape}")
    tokens, experts = scores.shape
    if not 1 <= k <= experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={experts}")
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function={score_function!r} must be one of {', '.join(map(repr, SCORE_FUNCTIONS))}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {bias.shape}, expected ({experts},)")
    if where is not None and where.shape != (tokens,):
        raise ValueError(f"where has shape {where.shape}, expected ({tokens},)")
    _check_groups(k, experts, groups, groups_kept, per_group)
    route = functools.partial(
        _route,
        k=k,
        groups=groups,
        groups_kept=groups_kept,
        per_group=per_group,
        renormalize=renormalize,
        score_function=score_function,
        definition=chosen == "reference",
    )
    return rows_mixed(route)(*match_varying(scores, bias, where))


def plan_from_top_k(top_k: TopK, logits: Array) -> RoutingPlan:
    """Returns the routing plan of a choice: A = T k assignments, sorted stably by expert.

    Args:
        top_k: what `top_k_routing` returned.
        logits: [T, E], raw router outputs, kept in float32 for the z-loss.

    Returns:
        A `RoutingPlan` whose `scores` are `top_k.probs`; nothing is dropped.

    Raises:
        ValueError: logits are not [T, E].

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[0.0, 2.0], [1.0, 0.0]])
        >>> plan = plan_from_top_k(top_k_routing(logits, 1), logits)
        >>> plan.token.tolist(), plan.expert.tolist()
        ([1, 0], [0, 1])
    """
    if logits.shape != top_k.probs.shape:
        raise ValueError(f"logits has shape {logits.shape}, expected {top_k.probs.shape}")
    return rows_mixed(_plan)(top_k, logits)


def _check_groups(k: int, experts: int, groups: int | None, groups_kept: int | None, per_group: bool) -> None:
    if groups is None:
        if groups_kept is not None or per_group:
            raise ValueError("groups is needed with groups_kept or per_group")
        return
    if groups < 1 or experts % groups:
        raise ValueError(f"groups={groups} must divide num_experts={experts}")
    if (groups_kept is not None) == per_group:
        raise ValueError("groups needs exactly one of groups_kept and per_group")
    size = experts // groups
    if per_group:
        if k % groups:
            raise ValueError(f"k={k} must be a multiple of groups={groups} with per_group")
        return
    if groups_kept is None or not 1 <= groups_kept <= groups:
        raise ValueError(f"groups_kept={groups_kept} must be between 1 and groups={groups}")
    if k > groups_kept * size:
        raise ValueError(f"k={k} must be at most groups_kept * experts per group = {groups_kept * size}")


_STATIC = ("k", "groups", "groups_kept", "per_group", "renormalize", "score_function", "definition")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _route(scores, bias, where, *, k, groups, groups_kept, per_group, renormalize, score_function, definition) -> TopK:
    tokens, experts = scores.shape
    scores = scores.astype(compute_dtype(scores))
    largest = jnp.finfo(scores.dtype).max
    known = ~jnp.isnan(scores)
    keep = known if where is None else known & where[:, None]
    scores = jnp.clip(jnp.where(keep, scores, 0.0), -largest, largest)
    probs = _probabilities(scores, keep, score_function)

    value, choice = jax.lax.stop_gradient((probs, scores))
    if bias is not None:
        value = value + jax.lax.stop_gradient(bias).astype(scores.dtype)[None, :]
        keep = keep & ~jnp.isnan(value)
        value = jnp.clip(value, -largest, largest)
        choice = value
    # What is not kept is -inf, below every clipped score; -0.0 must tie with 0.0.
    choice = jnp.where(keep, jnp.where(choice == 0, 0.0, choice), -jnp.inf)
    best = _best_by_sorting if definition else jax.lax.top_k
    if groups is None:
        ids = best(choice, k)[1]
    elif per_group:
        inside = best(choice.reshape(tokens, groups, experts // groups), k // groups)[1]
        first = jnp.arange(groups, dtype=jnp.int32) * (experts // groups)
        candidates = (inside + first[None, :, None]).reshape(tokens, k)
        ranking = best(jnp.take_along_axis(choice, candidates, axis=1), k)[1]
        ids = jnp.take_along_axis(candidates, ranking, axis=1)
    else:
        size = experts // groups
        value = jnp.where(keep, value, -largest / 4).reshape(tokens, groups, size)
        strength = best(value, min(2, size))[0].sum(-1)
        groups_chosen = best(strength, groups_kept)[1]
        allowed = (groups_chosen[:, :, None] == jnp.arange(groups)[None, None, :]).any(1)
        allowed = jnp.repeat(allowed, size, axis=1)
        # Two keys, so that a NaN in a kept group still comes before every expert of the other groups.
        candidates = best(allowed.astype(choice.dtype), groups_kept * size)[1]
        inside = best(jnp.take_along_axis(choice, candidates, axis=1), k)[1]
        ids = jnp.take_along_axis(candidates, inside, axis=1)
    ids = ids.astype(jnp.int32)

    weights = jnp.take_along_axis(probs, ids, axis=1)
    if renormalize:
        weights = safe_divide(weights, jnp.broadcast_to(weights.sum(1, keepdims=True), weights.shape))
    if where is not None:
        ids = jnp.where(where[:, None], ids, experts)
        weights = jnp.where(where[:, None], weights, 0.0)
    flat = ids.reshape(-1)
    if definition:
        counts = (flat[:, None] == jnp.arange(experts)[None, :]).sum(0, dtype=jnp.int32)
    else:
        counts = match_varying(jnp.zeros(experts, jnp.int32), flat)[0].at[flat].add(1, mode="drop")
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return TopK(ids, weights, counts, order, probs)


def _probabilities(scores: Array, keep: Array, score_function: str) -> Array:
    if score_function == "softmax":
        top = jax.lax.stop_gradient(jnp.max(jnp.where(keep, scores, -jnp.inf), axis=1, keepdims=True))
        exponential = jnp.where(keep, jnp.exp(jnp.where(keep, scores - top, 0.0)), 0.0)
        total = jnp.broadcast_to(exponential.sum(1, keepdims=True), scores.shape)
        return safe_divide(exponential, total)
    return jnp.where(keep, jax.nn.sigmoid(scores) if score_function == "sigmoid" else scores, 0.0)


def _best_by_sorting(x: Array, k: int) -> tuple[Array, Array]:
    ids = jnp.argsort(-x, axis=-1, stable=True)[..., :k]
    return jnp.take_along_axis(x, ids, axis=-1), ids


@jax.jit
def _plan(top_k: TopK, logits: Array) -> RoutingPlan:
    k = top_k.ids.shape[1]
    return RoutingPlan(
        token=top_k.order // k,
        expert=top_k.ids.reshape(-1)[top_k.order],
        weight=top_k.weights.reshape(-1)[top_k.order],
        counts=top_k.counts,
        scores=top_k.probs,
        logits=logits.astype(compute_dtype(logits)),
        dropped=match_varying(jnp.zeros((), jnp.int32), top_k.counts)[0],
    )
