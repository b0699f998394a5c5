"""Sparse mixtures of experts: routers that return a plan, dispatch, experts and balance losses.

Start with `top_k_router`, `swiglu_experts` and `moe_layer`; add `load_balancing_loss` of the plan to your loss.
"""

from jaxlab.moe.balance import expert_load, load_balancing_loss, router_z_loss
from jaxlab.moe.comet import comet_gate
from jaxlab.moe.layer import Experts, dropless, moe_layer, swiglu_experts
from jaxlab.moe.moge import group_dispatch, imbalance_score, moge_router, voted_experts
from jaxlab.moe.permutation import (
    hard_permutation,
    permutation_entropy,
    permutation_schedule,
    permutation_search,
    permute_plan,
    update_permutations,
)
from jaxlab.moe.plans import (
    GatePlan,
    dense_weights,
    plan_from_gates,
    plan_from_ids,
    plan_from_weights,
    selector_entropy,
)
from jaxlab.moe.routers import (
    balanced_hash,
    base_router,
    dselect_k_router,
    expert_choice_router,
    hash_router,
    reachability_penalty,
    relu_penalty,
    relu_router,
    sigmoid_router,
    sinkhorn_router,
    top_k_router,
    update_bias,
    update_relu_coefficient,
)

__all__ = [
    "Experts",
    "GatePlan",
    "balanced_hash",
    "base_router",
    "comet_gate",
    "dense_weights",
    "dropless",
    "dselect_k_router",
    "expert_choice_router",
    "expert_load",
    "group_dispatch",
    "hard_permutation",
    "hash_router",
    "imbalance_score",
    "load_balancing_loss",
    "moe_layer",
    "moge_router",
    "permutation_entropy",
    "permutation_schedule",
    "permutation_search",
    "permute_plan",
    "plan_from_gates",
    "plan_from_ids",
    "plan_from_weights",
    "reachability_penalty",
    "relu_penalty",
    "relu_router",
    "router_z_loss",
    "selector_entropy",
    "sigmoid_router",
    "sinkhorn_router",
    "swiglu_experts",
    "top_k_router",
    "update_bias",
    "update_permutations",
    "update_relu_coefficient",
    "voted_experts",
]
