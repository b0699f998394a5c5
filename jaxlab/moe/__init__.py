"""Sparse mixtures of experts: routers that return a plan, dispatch, experts and balance losses.

Start with `top_k_router`, `swiglu_experts` and `moe_layer`; add `load_balancing_loss` of the plan to your loss, and log
`router_health`. `dropless` and `capacity` are two dispatches of the same plan; `axis_name` spreads the experts over a
mesh.
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
from jaxlab.moe.emoe import avg_k_scores, balanced_kmeans, dense_to_emoe, emoe_ffn, emoe_to_dense
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
from jaxlab.moe.super_experts import (
    OutputProfile,
    attention_sink_score,
    fisher_kurtosis,
    massive_activations,
    merge_profiles,
    profile_outputs,
    prune_experts,
    rank_super_experts,
    sink_rate,
    super_expert_mask,
)

__all__ = [
    "Experts",
    "GatePlan",
    "NoisyPlan",
    "OutputProfile",
    "RouterHealth",
    "SlotPlan",
    "attention_sink_score",
    "avg_k_scores",
    "balanced_hash",
    "balanced_kmeans",
    "base_router",
    "capacity",
    "comet_gate",
    "dense_to_emoe",
    "dense_weights",
    "drop_rate",
    "dropless",
    "dselect_k_router",
    "emoe_ffn",
    "emoe_to_dense",
    "exchange_bytes",
    "expert_choice_router",
    "expert_load",
    "fisher_kurtosis",
    "group_dispatch",
    "hard_permutation",
    "hash_router",
    "imbalance_score",
    "importance_loss",
    "layer_experts",
    "limit_capacity",
    "load_balancing_loss",
    "load_loss",
    "massive_activations",
    "merge_profiles",
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
    "profile_outputs",
    "prune_experts",
    "rank_super_experts",
    "reachability_penalty",
    "relu_penalty",
    "relu_router",
    "router_health",
    "router_z_loss",
    "selector_entropy",
    "sigmoid_router",
    "sink_rate",
    "sinkhorn_router",
    "soft_router",
    "squared_variation",
    "super_expert_mask",
    "swiglu_experts",
    "top_k_router",
    "upcycle",
    "update_bias",
    "update_permutations",
    "update_relu_coefficient",
    "voted_experts",
]
