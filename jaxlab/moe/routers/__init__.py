"""Routers: layers that say which expert sees which token, and never touch an expert.

All have `apply(params, x [T, d], where=None, ...)`; tokens that `where` leaves out get no assignment, and what stands
in their rows reaches nothing. Router arithmetic is at least float32 whatever comes in.
"""

from jaxlab.moe.routers.balanced import base_router, sinkhorn_router
from jaxlab.moe.routers.dselect_k import dselect_k_router, reachability_penalty
from jaxlab.moe.routers.expert_choice import expert_choice_router
from jaxlab.moe.routers.fixed import balanced_hash, hash_router
from jaxlab.moe.routers.noisy import NoisyPlan, load_loss, noisy_top_k_router
from jaxlab.moe.routers.relu import relu_penalty, relu_router, update_relu_coefficient
from jaxlab.moe.routers.sigmoid import sigmoid_router, update_bias
from jaxlab.moe.routers.soft import soft_router
from jaxlab.moe.routers.top_k import top_k_router

__all__ = [
    "NoisyPlan",
    "balanced_hash",
    "base_router",
    "dselect_k_router",
    "expert_choice_router",
    "hash_router",
    "load_loss",
    "noisy_top_k_router",
    "reachability_penalty",
    "relu_penalty",
    "relu_router",
    "sigmoid_router",
    "sinkhorn_router",
    "soft_router",
    "top_k_router",
    "update_bias",
    "update_relu_coefficient",
]
