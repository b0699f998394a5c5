"""Sparse mixtures of experts: routers that return a plan, dispatch, experts and balance losses.

Start with `top_k_router`, `swiglu_experts` and `moe_layer`; add `load_balancing_loss` of the plan to your loss.
"""

from jaxlab.moe.balance import (
    expert_load,
    importance_loss,
    load_balancing_loss,
    mutual_information_loss,
    router_z_loss,
    squared_variation,
)
from jaxlab.moe.comet import comet_gate
from jaxlab.moe.dispatch import capacity, drop_rate, dropless, limit_capacity
from jaxlab.moe.exchange import exchange_bytes
from jaxlab.moe.experts import Experts, layer_experts, swiglu_experts, upcycle
from jaxlab.moe.health import RouterHealth, router_health
from jaxlab.moe.layer import moe_layer
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
    SlotPlan,
    dense_weights,
    plan_from_gates,
    plan_from_ids,
    plan_from_weights,
    selector_entropy,
)
from jaxlab.moe.routers import (
    NoisyPlan,
    balanced_hash,
    base_router,
    dselect_k_router,
    expert_choice_router,
    hash_router,
    load_loss,
    noisy_top_k_router,
    reachability_penalty,
    relu_penalty,
    relu_router,
    sigmoid_router,
    sinkhorn_router,
    soft_router,
    top_k_router,
    update_bias,
    update_relu_coefficient,
)

__all__ = [
    "Experts",
    "GatePlan",
    "NoisyPlan",
    "RouterHealth",
    "SlotPlan",
    "balanced_hash",
    "base_router",
    "capacity",
    "comet_gate",
    "dense_weights",
    "drop_rate",
    "dropless",
    "dselect_k_router",
    "exchange_bytes",
    "expert_choice_router",
    "expert_load",
    "group_dispatch",
    "hard_permutation",
    "hash_router",
    "imbalance_score",
    "importance_loss",
    "layer_experts",
    "limit_capacity",
    "load_balancing_loss",
    "load_loss",
    "moe_layer",
    "moge_router",
    "mutual_information_loss",
    "noisy_top_k_router",
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
    "router_health",
    "router_z_loss",
    "selector_entropy",
    "sigmoid_router",
    "sinkhorn_router",
    "soft_router",
    "squared_variation",
    "swiglu_experts",
    "top_k_router",
    "upcycle",
    "update_bias",
    "update_permutations",
    "update_relu_coefficient",
    "voted_experts",
]
