"""A Survey on Mixture of Experts (2024, arXiv 2407.06204): its taxonomy made runnable.

The survey sorts mixtures by who chooses (tokens, experts, a table, nobody), by what the experts are, and by how they
are trained and served. In this family every cell of its table is one line of the same program: a router, a set of
experts, a dispatch. This file names the routers, merges experts instead of choosing (SMEAR), and counts what a layer
costs.

    dense          top_k_router(E, E)                     token choice   top_k_router, noisy_top_k_router, moge_router
    expert choice  expert_choice_router                   not trained    hash_router, enforced_router
    assignment     base_router, sinkhorn_router           differentiable relu_router, dselect_k_router, comet_gate
    tokens merged  soft_router                            experts merged smear_merge
    capacity       capacity, limit_capacity               no drops       dropless
    shared         moe_layer(shared=)                     any expert     layer_experts
    losses         load_balancing_loss (1 at balance, k times as large in Mixtral's code), importance_loss, load_loss,
                   router_z_loss, mutual_information_loss, update_bias (no loss at all)
    training       upcycle; emoe (dense to sparse), merge_experts, quantmoe

Costs: active parameters are those of k experts and what is shared; a product with n weights is 2 n operations; tokens
cross the devices twice (`exchange_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.moe.comet import comet_gate
from jaxlab.moe.enforced_moe import enforced_router
from jaxlab.moe.moge import moge_router
from jaxlab.moe.routers import (
    base_router,
    dselect_k_router,
    expert_choice_router,
    noisy_top_k_router,
    relu_router,
    sigmoid_router,
    sinkhorn_router,
    soft_router,
    top_k_router,
)
from jaxlab.ops.masked import compute_dtype, masked_mean
from jaxlab.types import Layer, StatefulLayer


class LayerCost(NamedTuple):
    """What one mixture layer costs.

    Attributes:
        total_params: of all experts, the router and what is shared.
        active_params: those that one token sees.
        flops_per_token: of the forward pass, 2 for each active weight.
        sent_bytes_per_token: over the axis of the experts there and back, on average.
    """

    total_params: int
    active_params: int
    flops_per_token: int
    sent_bytes_per_token: float


def taxonomy(num_experts: int, k: int = 2) -> dict[str, Callable[[], Layer | StatefulLayer]]:
    """Returns the routers of the survey's table by name, each as a function that builds it.

    Args:
        num_experts: E.
        k: experts of a token, where that is a choice.

    Returns:
        A dict of name to builder, in the order of the survey. `enforced` needs `ids` of its tokens.

    Example:
        >>> sorted(taxonomy(4))[:3]
        ['base', 'comet', 'dense']
    """
    return {
        "dense": lambda: top_k_router(num_experts, num_experts),
        "top_k": lambda: top_k_router(num_experts, k),
        "switch": lambda: top_k_router(num_experts, 1, renormalize=False),
        "noisy_top_k": lambda: noisy_top_k_router(num_experts, k),
        "sigmoid_bias": lambda: sigmoid_router(num_experts, k),
        "per_group": lambda: moge_router(num_experts, k, groups=k),
        "expert_choice": lambda: expert_choice_router(num_experts, float(k)),
        "enforced": lambda: enforced_router(num_experts),
        "base": lambda: base_router(num_experts),
        "sinkhorn": lambda: sinkhorn_router(num_experts, k),
        "relu": lambda: relu_router(num_experts),
        "dselect_k": lambda: dselect_k_router(num_experts, k),
        "comet": lambda: comet_gate(num_experts, k),
        "soft": lambda: soft_router(num_experts),
    }


def smear_merge(params: Any, probs: Array, *, where: Array | None = None) -> Any:
    """Returns one expert whose parameters are the experts' mean by the router's mean probabilities (SMEAR).

    `theta = sum_e (mean_t p_te) theta_e`: everything stays differentiable, and a sequence costs one expert.

    Args:
        params: pytree of arrays with a leading axis E.
        probs: float [T, E], of the tokens of one sequence (a plan's `scores`).
        where: bool [T], tokens that exist.

    Returns:
        The pytree without the axis E, in its own dtypes; 0 without tokens.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> run = jax.jit(lambda w, p: smear_merge({"w": w}, p)["w"])
        >>> run(jnp.array([[0.0], [4.0]]), jnp.array([[1.0, 0.0], [0.5, 0.5]])).tolist()
        [1.0]

    Source:
        Muqeeth, Liu, Raffel, Soft Merging of Experts with Adaptive Routing, arXiv 2306.03745.
    """
    if probs.ndim != 2 or (where is not None and where.shape != probs.shape[:1]):
        raise ValueError(f"probs must be [T, E] and where [T], got shape {probs.shape}")
    for leaf in jax.tree.leaves(params):
        if leaf.ndim < 1 or leaf.shape[0] != probs.shape[1]:
            raise ValueError(f"params have shape {leaf.shape}, expected a leading axis of {probs.shape[1]} experts")
    share = masked_mean(probs, where, axis=0)

    def merge(leaf):
        wide = leaf.reshape(leaf.shape[0], -1).astype(compute_dtype(leaf))
        merged = jnp.matmul(share.astype(wide.dtype)[None], wide, precision=jax.lax.Precision.HIGHEST)
        return merged.reshape(leaf.shape[1:]).astype(leaf.dtype)

    return jax.tree.map(merge, params)


def moe_accounting(
    params: Any, *, num_experts: int, k: float, size: int, devices: int = 1, itemsize: int = 2
) -> LayerCost:
    """Returns what a mixture layer has and what a token of it costs (host).

    Args:
        params: of `moe_layer`: a dict of `router`, `experts` and perhaps `shared`; arrays or shapes.
        num_experts: E, the leading axis of `experts`.
        k: experts of a token, on average.
        size: d, features of a token.
        devices: over which the experts are spread.
        itemsize: bytes of a feature (2 for bfloat16).

    Returns:
        A `LayerCost`.

    Raises:
        ValueError: `k` is out of range or the experts do not have that axis.

    Example:
        >>> params = {"router": {"w": np.zeros((4, 8))}, "experts": {"up": np.zeros((8, 4, 5))}}
        >>> moe_accounting(params, num_experts=8, k=2, size=4, devices=4)
        LayerCost(total_params=192, active_params=72, flops_per_token=144, sent_bytes_per_token=24.0)

    Source:
        Cai et al., arXiv 2407.06204, section 5 (costs of computing and communication).
    """
    if not 0 < k <= num_experts or devices < 1:
        raise ValueError(f"k={k} must be above 0 and at most num_experts={num_experts}, devices={devices} at least 1")
    for leaf in jax.tree.leaves(params["experts"]):
        if leaf.shape[:1] != (num_experts,):
            raise ValueError(f"experts have shape {leaf.shape}, expected a leading axis of {num_experts}")
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    routed = count(params["experts"])
    common = count({name: tree for name, tree in params.items() if name != "experts"})
    active = common + round(routed * k / num_experts)
    return LayerCost(
        total_params=common + routed,
        active_params=active,
        flops_per_token=2 * active,
        sent_bytes_per_token=2 * k * size * itemsize * (1 - 1 / devices),
    )
