"""Kernels: the operations whose speed matters, each one function with `implementation="auto" | "reference" | "xla"`."""

from jaxlab.kernels.attention import attention
from jaxlab.kernels.expert_ffn import expert_ffn
from jaxlab.kernels.top_k_routing import TopK, plan_from_top_k, top_k_routing

__all__ = ["TopK", "attention", "expert_ffn", "plan_from_top_k", "top_k_routing"]
