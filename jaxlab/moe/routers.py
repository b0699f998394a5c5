"""Routers: layers that say which expert sees which token, and never touch an expert.

All have `apply(params, x [T, d], where=None, ...)`; tokens that `where` leaves out get no assignment, and what stands
in their rows reaches nothing. Router arithmetic is at least float32 whatever comes in.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.moe.plans import GatePlan, plan_from_gates, plan_from_ids, plan_from_weights
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.collectives import all_sum, global_mean
from jaxlab.ops.masked import compute_dtype, masked_softmax, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.soft_trees import smooth_step
from jaxlab.ops.transport import sinkhorn
from jaxlab.types import Layer, RoutingPlan, StatefulLayer


def top_k_router(
    num_experts: int,
    k: int = 2,
    *,
    score_function: str = "softmax",
    groups: int | None = None,
    groups_kept: int | None = None,
    per_group: bool = False,
    renormalize: bool = True,
    noise: float = 0.0,
    jitter: float = 0.0,
    implementation: str = "auto",
) -> Layer:
    """Returns a router that sends each token to its k most probable experts.

    `logits = x w`, `p = softmax(logits)`; the plan's weights are the k largest p, divided by their sum if
    `renormalize`. In training, `noise` adds `noise / E * N(0, 1)` to the logits (V-MoE) and `jitter` multiplies the
    input by `U(1 - jitter, 1 + jitter)` (Switch); evaluation is deterministic.

    Args:
        num_experts: E.
        k: experts per token, 1 to E.
        score_function: "softmax" or "sigmoid".
        groups: number of equal groups of neighbouring experts; needs `groups_kept` or `per_group`.
        groups_kept: choose only within the best groups of each token (DeepSeek-V3).
        per_group: choose k / groups experts in each group (MoGE).
        renormalize: whether the k weights of a token sum to 1.
        noise: standard deviation of the noise on the logits, times E.
        jitter: relative half-width of the multiplicative noise on the input.
        implementation: as in `kernels.top_k_routing`.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, key=None, train=False)` gives a `RoutingPlan` of
        A = T k assignments.

    Raises:
        ValueError: k or a group option is out of range, or noise is asked for in training without a key.

    Example:
        >>> router = top_k_router(4, 2)
        >>> plan = router.apply(router.init(jax.random.key(0), 8), jax.numpy.ones((3, 8)))
        >>> int(plan.counts.sum())
        6
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function={score_function!r} must be 'softmax' or 'sigmoid'")

    def apply(params, x, *, where=None, key=None, train=False):
        noisy = train and (noise > 0 or jitter > 0)
        if noisy and key is None:
            raise ValueError("key is needed: this router is noisy in training")
        x = _tokens(x, where)
        if noisy:
            key_noise, key_jitter = jax.random.split(key)
            if jitter > 0:
                x = x * jax.random.uniform(key_jitter, x.shape, x.dtype, minval=1 - jitter, maxval=1 + jitter)
        logits = _linear(params, x)
        if noisy and noise > 0:
            logits = logits + noise / num_experts * jax.random.normal(key_noise, logits.shape, logits.dtype)
        chosen = top_k_routing(
            logits,
            k,
            groups=groups,
            groups_kept=groups_kept,
            per_group=per_group,
            renormalize=renormalize,
            score_function=score_function,
            where=where,
            implementation=implementation,
        )
        return plan_from_top_k(chosen, logits)

    return Layer(_linear_init(num_experts), apply)


def sigmoid_router(
    num_experts: int,
    k: int = 8,
    *,
    groups: int | None = None,
    groups_kept: int | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    implementation: str = "auto",
) -> StatefulLayer:
    """Returns the router of DeepSeek-V3: sigmoid scores, balanced by a bias instead of a loss.

    `p = sigmoid(x w)`; the k largest `p + bias` are chosen, their weights are `scale * p / sum of the chosen p`. The
    bias has no gradient: `update_bias` moves it once per optimiser step.

    Args:
        num_experts: E.
        k: experts per token, 1 to E.
        groups: number of equal groups of neighbouring experts; needs `groups_kept`.
        groups_kept: choose only within the groups whose two best `p + bias` have the largest sum.
        renormalize: whether the chosen p are divided by their sum.
        scale: factor of the weights (DeepSeek-V3: 2.5, with 256 experts, k = 8 and 4 of 8 groups).
        implementation: as in `kernels.top_k_routing`.

    Returns:
        A `StatefulLayer`: `params, state = init(key, d)` with the state `{bias: float32 [E]}`, 0 at first;
        `apply(params, state, x [T, d], where=None)` gives a `RoutingPlan` of A = T k assignments and the same state.

    Raises:
        ValueError: k or a group option is out of range.

    Example:
        >>> router = sigmoid_router(4, 2)
        >>> params, state = router.init(jax.random.key(0), 8)
        >>> plan, state = router.apply(params, state, jnp.ones((3, 8)))
        >>> state = update_bias(state, plan.counts)
        >>> int(jnp.sum(state["bias"] > 0)), int(jnp.sum(state["bias"] < 0))
        (2, 2)

    Source:
        DeepSeek-V3, arXiv 2412.19437, section 2.1.2; Wang et al., Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")

    def init(key, size):
        return _linear_init(num_experts)(key, size), {"bias": jnp.zeros(num_experts)}

    def apply(params, state, x, *, where=None):
        logits = _linear(params, _tokens(x, where))
        chosen = top_k_routing(
            logits,
            k,
            bias=state["bias"],
            groups=groups,
            groups_kept=groups_kept,
            renormalize=renormalize,
            score_function="sigmoid",
            where=where,
            implementation=implementation,
        )
        return plan_from_top_k(dataclasses.replace(chosen, weights=scale * chosen.weights), logits), state

    return StatefulLayer(init, apply)


def update_bias(state: dict, counts: Array, *, rate: float = 1e-3, axis_name: str | None = None) -> dict:
    """Returns the state of `sigmoid_router` after one optimiser step: busy experts down, idle ones up, mean 0.

    `bias <- b - mean(b)` with `b = bias + rate * sign(mean(counts) - counts)`. Subtracting the mean changes no choice
    and keeps the bias from drifting.

    Args:
        state: of `sigmoid_router`.
        counts: int [E], `plan.counts` of the step (summed over micro-batches).
        rate: of the change (DeepSeek-V3: 1e-3, and 0 at the end of training).
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        The new state.

    Example:
        >>> update_bias({"bias": jnp.zeros(2)}, jnp.array([3, 1]), rate=0.5)["bias"].tolist()
        [-0.5, 0.5]

    Source:
        Wang et al., arXiv 2408.15664, algorithm 1. Reconstructed: the mean.
    """
    bias = state["bias"]
    load = all_sum(jax.lax.stop_gradient(counts).astype(bias.dtype), axis_name)
    moved = bias + rate * jnp.sign(jnp.mean(load, keepdims=True) - load)
    return {**state, "bias": moved - jnp.mean(moved, keepdims=True)}


def hash_router(table: Array, num_experts: int) -> Layer:
    """Returns a router without parameters that sends each token to the experts that a table holds for its id.

    Args:
        table: int [V] or [V, k], experts of each id; distinct in a row, and -1 = none. Random
            (`jax.random.randint`), or balanced by frequency (`balanced_hash`).
        num_experts: E.

    Returns:
        A `Layer`: `init(key, d)` gives `{}`; `apply(params, x [T, d], ids=int [T], where=None)` gives a `RoutingPlan`
        of A = T k assignments of weight 1 / k. Ids outside 0 .. V - 1 get none.

    Raises:
        ValueError: `table` is not [V] or [V, k]; in `apply`, a shape does not fit.

    Example:
        >>> router = hash_router(jnp.array([2, 0, 1]), num_experts=3)
        >>> plan = router.apply({}, jnp.ones((4, 8)), ids=jnp.array([0, 0, 1, 2]))
        >>> plan.counts.tolist()
        [1, 1, 2]

    Source:
        Roller et al., Hash Layers For Large Sparse Models, arXiv 2106.04426. Several experts an id, with equal weights,
        as in the comparison of COMET, arXiv 2306.02824.
    """
    table = jnp.asarray(table)
    if table.ndim not in (1, 2) or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(f"table must be int [V] or [V, k], got {table.dtype} {table.shape}")
    table = table[:, None] if table.ndim == 1 else table
    size, k = table.shape

    def init(key, size):
        del key, size
        return {}

    def apply(params, x, *, ids, where=None):
        del params
        if x.ndim != 2 or ids.shape != x.shape[:1]:
            raise ValueError(f"x and ids must be [T, d] and [T], got {x.shape} and {ids.shape}")
        known = (ids >= 0) & (ids < size)
        experts = jnp.where(known[:, None], jnp.take(table, jnp.clip(ids, 0, size - 1), axis=0), -1)
        weights = jnp.full(experts.shape, 1 / k, compute_dtype(x))
        each = jax.nn.one_hot(experts, num_experts, dtype=weights.dtype)
        probs = jnp.sum(each, axis=1) / k
        keep = known if where is None else known & where
        return plan_from_ids(experts, weights, probs, jnp.zeros_like(probs), where=keep)

    return Layer(init, apply)


def balanced_hash(frequencies: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns the table that gives ids, from the most frequent on, to the expert with the least load so far (host).

    Args:
        frequencies: >= 0 [V], how often each id occurs.
        num_experts: E.

    Returns:
        int32 [V], for `hash_router`.

    Raises:
        ValueError: `frequencies` is not [V] or `num_experts` is less than 1.

    Example:
        >>> balanced_hash(np.array([5, 1, 4, 1]), 2).tolist()
        [0, 1, 1, 0]

    Source:
        Roller et al., arXiv 2106.04426, section 3.2 ("balanced assignment").
    """
    frequencies = np.asarray(frequencies, np.float64)
    if frequencies.ndim != 1 or num_experts < 1:
        raise ValueError(f"frequencies must be [V] and num_experts={num_experts} at least 1, got {frequencies.shape}")
    table, load = np.zeros(len(frequencies), np.int32), np.zeros(num_experts)
    for i in np.argsort(-frequencies, kind="stable"):
        table[i] = load.argmin()
        load[table[i]] += frequencies[i]
    return table


def dselect_k_router(
    num_experts: int,
    k: int = 2,
    *,
    per_token: bool = True,
    width: float = 1.0,
    max_active: int | None = None,
) -> Layer:
    """Returns the DSelect-k gate: k selectors of one expert each, in a relaxed binary code of its number.

    Selector s has m = ceil(log2 E) smooth steps `q = S(x z_s)`; `r_se = product over the bits of e of q or 1 - q` (the
    first step is the highest bit), and `w_e = sum_s softmax_s(x a) r_se`. With settled steps each selector picks one
    expert. If E is no power of 2, codes E .. 2^m - 1 belong to no expert: add `reachability_penalty` to the loss.

    Args:
        num_experts: E >= 2.
        k: number of selectors, 1 to E.
        per_token: whether the gate depends on the token; otherwise the same learnt gate serves all ("static").
        width: > 0, of the smooth step (gamma).
        max_active: room of the plan for each token, as in `comet_gate`.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None)` gives a `GatePlan` of A = T `max_active`
        assignments, of which those of weight 0 are unused. Add `selector_entropy` to the loss.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> router = dselect_k_router(4, 2)
        >>> plan = router.apply(router.init(jax.random.key(0), 8), jnp.ones((3, 8)))
        >>> bool(jnp.allclose(plan.scores.sum(1), 1))
        True

    Source:
        Hazimeh et al., DSelect-k, arXiv 2106.03760, section 3; official code (initialisation, penalty).
    """
    if num_experts < 2 or not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}, which must be at least 2")
    if not width > 0:
        raise ValueError(f"width={width} must be positive")
    if max_active is not None and not 1 <= max_active <= num_experts:
        raise ValueError(f"max_active={max_active} must be between 1 and num_experts={num_experts}")
    bits = math.ceil(math.log2(num_experts))
    code = (np.arange(num_experts)[:, None] >> np.arange(bits)[::-1][None, :]) & 1 == 1

    def init(key, size):
        def uniform(key, shape, limit):
            return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

        key_z, key_c, key_a, key_b = jax.random.split(key, 4)
        # Without tokens the official gate has one parameter where it has an affine map of the token otherwise.
        bias = {"z": uniform(key_c, (k, bits), width / 100), "a": uniform(key_b, (k,), 0.05)}
        if not per_token:
            return {"bias": bias}
        w = {"z": uniform(key_z, (size, k, bits), width / 100), "a": uniform(key_a, (size, k), 0.05)}
        return {"w": w, "bias": bias}

    def apply(params, x, *, where=None):
        x = _tokens(x, where)
        bias = jax.tree.map(lambda leaf: leaf.astype(x.dtype)[None], params["bias"])
        z, a = (jnp.broadcast_to(leaf, (x.shape[0], *leaf.shape[1:])) for leaf in (bias["z"], bias["a"]))
        if per_token:
            w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params["w"])
            z = z + jnp.einsum("td,dsb->tsb", x, w["z"], precision=jax.lax.Precision.HIGHEST)
            a = a + jnp.matmul(x, w["a"], precision=jax.lax.Precision.HIGHEST)
        steps = smooth_step(z, width=width)
        selectors = jnp.ones((*steps.shape[:2], num_experts), steps.dtype)
        for bit in range(bits):  # factor by factor, so that gradients are exact where one is 0
            step = steps[:, :, bit, None]
            selectors = selectors * jnp.where(jnp.asarray(code[:, bit])[None, None, :], step, 1 - step)
        gates = masked_softmax(a)[:, :, None] * selectors
        return plan_from_gates(gates, selectors, max_active=max_active, where=where)

    return Layer(init, apply)


def reachability_penalty(
    plan: GatePlan, *, where: Array | None = None, eps: float = 1e-6, axis_name: str | None = None
) -> Array:
    """Returns the mean over tokens of `sum_s 1 / sum_e r_se`, which keeps DSelect-k's selectors on codes of experts.

    At its least, the number of selectors k, all probability lies on experts; only needed if E is no power of 2.

    Args:
        plan: of `dselect_k_router`.
        where: bool [T], tokens that exist.
        eps: > 0, least sum that is divided by.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 without tokens.

    Raises:
        ValueError: the plan has no selectors, or `eps` is not positive.

    Example:
        >>> router = dselect_k_router(4, 2)
        >>> plan = router.apply(router.init(jax.random.key(0), 8), jnp.ones((3, 8)))
        >>> round(float(reachability_penalty(plan)), 4)
        2.0

    Source:
        Official code of DSelect-k, arXiv 2106.03760, which sums over the batch. Reconstructed: eps.
    """
    if not isinstance(plan, GatePlan):
        raise ValueError(f"plan must be a GatePlan, which has selectors, got {type(plan).__name__}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    keep = jnp.ones(plan.selectors.shape[0], bool) if where is None else where
    total = jnp.sum(jnp.where(keep[:, None, None], plan.selectors, 1.0), axis=2)
    return global_mean(jnp.sum(1 / jnp.maximum(total, eps), axis=1), keep, axis_name=axis_name)


def expert_choice_router(num_experts: int, capacity_factor: float = 2.0) -> Layer:
    """Returns a router in which experts choose: each takes the `T * capacity_factor / E` tokens that like it most.

    `p = softmax(x w)` over experts; expert e takes the tokens with the largest `p[:, e]`, with these weights. Load is
    equal by construction; a token may go to many experts or to none. Choosing looks at all tokens of this shard, later
    ones included, so that it is no router for causal language models.

    Args:
        num_experts: E.
        capacity_factor: > 0, mean number of experts of a token.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None)` gives a `RoutingPlan` of A = E c assignments, c
        = T * capacity_factor / E rounded to the nearest, 1 to T. `plan.dropped` counts the tokens that no expert took.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> router = expert_choice_router(2, 1.0)
        >>> plan = router.apply(router.init(jax.random.key(0), 8), jax.random.normal(jax.random.key(1), (6, 8)))
        >>> plan.counts.tolist()
        [3, 3]

    Source:
        Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368, section 3.2.
    """
    if num_experts < 1 or not capacity_factor > 0:
        raise ValueError(f"num_experts={num_experts} and capacity_factor={capacity_factor} must be positive")

    def apply(params, x, *, where=None):
        logits = _linear(params, _tokens(x, where))
        keep = jnp.ones(x.shape[0], bool) if where is None else where
        capacity = max(1, min(x.shape[0], round(x.shape[0] * capacity_factor / num_experts)))
        return rows_mixed(_expert_choice)(logits, keep, capacity=capacity)

    return Layer(_linear_init(num_experts), apply)


def sinkhorn_router(
    num_experts: int, k: int = 1, *, epsilon: float = 1.0, iterations: int = 20, renormalize: bool = False
) -> Layer:
    """Returns a router that balances the choice of a batch by optimal transport in training (S-BASE).

    In training the k largest entries of `sinkhorn(-logits, epsilon)` over tokens and experts are chosen, in evaluation
    the k largest logits; the weights are `softmax(logits)` of the chosen either way. Transport has no gradient, and
    balances the tokens of this shard.

    Args:
        num_experts: E.
        k: experts per token, 1 to E.
        epsilon: > 0, weight of the entropy; towards 0 the balance of the choice becomes exact.
        iterations: of Sinkhorn.
        renormalize: whether the k weights of a token sum to 1.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, train=False)` gives a `RoutingPlan` of A = T k.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> router = sinkhorn_router(2, epsilon=0.1)
        >>> x = jax.random.normal(jax.random.key(1), (6, 8))
        >>> router.apply({"w": jnp.ones((8, 2)) + x[:2].T}, x).counts.shape
        (2,)

    Source:
        Clark et al., Unified Scaling Laws for Routed Language Models, arXiv 2202.01169, appendix B. epsilon = 1 is the
        plain normalisation of exp(logits).
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")

    def apply(params, x, *, where=None, train=False):
        logits = _linear(params, _tokens(x, where))
        plain = top_k_routing(logits, k, renormalize=renormalize, where=where)
        if not train:
            return plan_from_top_k(plain, logits)
        cost = -jax.lax.stop_gradient(logits)
        # The transport of a token that is certain of an expert is 0 in all others: its logits break the tie.
        balanced = jnp.log(jnp.maximum(sinkhorn(cost, epsilon=epsilon, iterations=iterations, where=where), 1e-30))
        ids = top_k_routing(balanced - 1e-6 * cost, k, score_function="none", where=where).ids
        weights = jnp.take_along_axis(plain.probs, jnp.minimum(ids, num_experts - 1), axis=1)
        if renormalize:
            weights = safe_divide(weights, jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True), weights.shape))
        return plan_from_ids(ids, weights, plain.probs, logits, where=where)

    return Layer(_linear_init(num_experts), apply)


def base_router(num_experts: int) -> Layer:
    """Returns the router of BASE layers: in training tokens are assigned to experts in equal shares, exactly.

    Training: the assignment of T tokens to E experts of ceil(T / E) places with the largest sum of logits (O(T^3): for
    up to some hundred tokens a shard). Evaluation: each token's best expert. The weight is the sigmoid of the logit.

    Args:
        num_experts: E.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, train=False)` gives a `RoutingPlan` of A = T.

    Raises:
        ValueError: `num_experts` is less than 1.

    Example:
        >>> router = base_router(2)
        >>> params = {"w": jnp.array([[1.0, 0.0]])}
        >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
        >>> router.apply(params, x).counts.tolist(), router.apply(params, x, train=True).counts.tolist()
        ([4, 0], [2, 2])

    Source:
        Lewis et al., BASE Layers, arXiv 2103.16716, section 3.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")

    def apply(params, x, *, where=None, train=False):
        logits = _linear(params, _tokens(x, where))
        scores = jax.nn.sigmoid(logits)
        if train:
            places = -(-x.shape[0] // num_experts)
            keep = jnp.ones(x.shape[0], bool) if where is None else where
            ids = rows_mixed(_balanced)(jax.lax.stop_gradient(logits), keep, places=places)
        else:
            ids = jnp.argmax(logits, axis=1)[:, None]
        weights = jnp.take_along_axis(scores, jnp.maximum(ids, 0), axis=1)
        return plan_from_ids(ids, weights, scores, logits, where=where)

    return Layer(_linear_init(num_experts), apply)


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
        >>> router.apply({"w": jnp.array([[1.0, -1.0, 2.0]])}, jnp.ones((2, 1))).counts.tolist()
        [2, 0, 2]

    Source:
        Wang et al., ReMoE, arXiv 2412.14711, section 3.
    """
    if max_active is not None and not 1 <= max_active <= num_experts:
        raise ValueError(f"max_active={max_active} must be between 1 and num_experts={num_experts}")

    def apply(params, x, *, where=None):
        logits = _linear(params, _tokens(x, where))
        return plan_from_weights(jax.nn.relu(logits), logits, max_active=max_active, where=where)

    return Layer(_linear_init(num_experts), apply)


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
        >>> plan = relu_router(2).apply({"w": jnp.array([[1.0, -1.0]])}, jnp.ones((4, 1)))
        >>> float(relu_penalty(plan, k=1))
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
        >>> plan = relu_router(2).apply({"w": jnp.array([[1.0, 2.0]])}, jnp.ones((4, 1)))
        >>> round(float(update_relu_coefficient(jnp.float32(1.0), plan, k=1)), 4)
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


def _linear_init(num_experts: int):
    def init(key, size):
        return {"w": jax.random.normal(key, (size, num_experts)) * 0.02}

    return init


def _tokens(x: Array, where: Array | None) -> Array:
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
    if where is not None and where.shape != x.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:1]}")
    x = zero_where_false(x, where)
    return x.astype(compute_dtype(x))


def _linear(params: dict, x: Array) -> Array:
    return x @ params["w"].astype(x.dtype)


def _expert_choice(logits: Array, keep: Array, *, capacity: int) -> RoutingPlan:
    experts = logits.shape[1]
    probs = jnp.where(keep[:, None], jax.nn.softmax(logits, axis=1), jnp.zeros((), logits.dtype))
    wanted = jnp.where(keep[:, None], jax.lax.stop_gradient(probs), -1.0)
    _, token = jax.lax.top_k(wanted.T, capacity)
    real = keep[token]
    expert = jnp.where(real, jnp.arange(experts)[:, None], experts).reshape(-1).astype(jnp.int32)
    token = token.reshape(-1).astype(jnp.int32)
    weight = jnp.where(real.reshape(-1), probs[token, jnp.minimum(expert, experts - 1)], 0.0)
    order = jnp.lexsort((token, expert))
    served = jnp.zeros_like(keep).at[token].max(expert < experts)
    return RoutingPlan(
        token=token[order],
        expert=expert[order],
        weight=weight[order],
        counts=jnp.sum(real, axis=1, dtype=jnp.int32),
        scores=probs,
        logits=logits,
        dropped=jnp.sum(keep & ~served, dtype=jnp.int32),
    )


def _balanced(logits: Array, keep: Array, *, places: int) -> Array:
    columns = linear_assignment(jnp.repeat(logits, places, axis=1), maximize=True, where=keep)
    return jnp.where(columns >= 0, columns // places, -1)[:, None]
