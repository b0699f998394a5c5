"""Kernels: the operations whose speed matters, each one function with `implementation="auto" | "reference" | "xla"`."""

from jaxlab.kernels.attention import attention
from jaxlab.kernels.attention_pool import attention_pool
from jaxlab.kernels.expert_ffn import expert_ffn
from jaxlab.kernels.grouped_matmul import grouped_matmul
from jaxlab.kernels.selective_scan import selective_scan
from jaxlab.kernels.top_k_routing import TopK, plan_from_top_k, top_k_routing

__all__ = [
    "TopK",
    "attention",
    "attention_pool",
    "expert_ffn",
    "grouped_matmul",
    "plan_from_top_k",
    "selective_scan",
    "top_k_routing",
]
