"""Sparse mixtures of experts: routers that return a plan, dispatch, experts and balance losses.

Start with `top_k_router`, `swiglu_experts` and `moe_layer`; add `load_balancing_loss` of the plan to your loss.
"""

from jaxlab.moe.balance import expert_load, load_balancing_loss, router_z_loss
from jaxlab.moe.layer import Experts, dropless, moe_layer, swiglu_experts
from jaxlab.moe.routers import top_k_router

__all__ = [
    "Experts",
    "dropless",
    "expert_load",
    "load_balancing_loss",
    "moe_layer",
    "router_z_loss",
    "swiglu_experts",
    "top_k_router",
]
