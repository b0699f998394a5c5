"""The DSelect-k gate and the penalty that keeps it on codes of experts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.moe.plans import GatePlan, plan_from_gates
from jaxlab.moe.routers._linear import clean_tokens
from jaxlab.ops.collectives import global_mean
from jaxlab.ops.masked import masked_softmax
from jaxlab.ops.soft_trees import smooth_step
from jaxlab.types import Layer


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
        >>> plan = jax.jit(lambda key: router.apply(router.init(key, 8), jnp.ones((1, 8))))(jax.random.key(0))
        >>> round(sum(plan.scores[0].tolist()), 4)
        1.0

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
        x = clean_tokens(x, where)
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
        >>> loss = lambda key: reachability_penalty(router.apply(router.init(key, 8), jnp.ones((3, 8))))
        >>> round(float(jax.jit(loss)(jax.random.key(0))), 4)
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
