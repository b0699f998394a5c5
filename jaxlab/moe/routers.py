"""Routers: layers that say which expert sees which token, and never touch an expert."""

from __future__ import annotations

import jax

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.ops.masked import compute_dtype
from jaxlab.types import Layer


def top_k_router(
    num_experts: int,
    k: int = 2,
    *,
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
        renormalize: whether the k weights of a token sum to 1.
        noise: standard deviation of the noise on the logits, times E.
        jitter: relative half-width of the multiplicative noise on the input.
        implementation: as in `kernels.top_k_routing`.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], key=None, train=False)` gives a `RoutingPlan` of A = T k
        assignments. Router arithmetic is at least float32 whatever comes in.

    Raises:
        ValueError: k is out of range, or noise is asked for in training without a key.

    Example:
        >>> router = top_k_router(4, 2)
        >>> plan = router.apply(router.init(jax.random.key(0), 8), jax.numpy.ones((3, 8)))
        >>> int(plan.counts.sum())
        6
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")

    def init(key, size):
        return {"w": jax.random.normal(key, (size, num_experts)) * 0.02}

    def apply(params, x, *, key=None, train=False):
        if x.ndim != 2:
            raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
        noisy = train and (noise > 0 or jitter > 0)
        if noisy and key is None:
            raise ValueError("key is needed: this router is noisy in training")
        x = x.astype(compute_dtype(x))
        if noisy:
            key_noise, key_jitter = jax.random.split(key)
            if jitter > 0:
                x = x * jax.random.uniform(key_jitter, x.shape, x.dtype, minval=1 - jitter, maxval=1 + jitter)
        logits = x @ params["w"].astype(x.dtype)
        if noisy and noise > 0:
            logits = logits + noise / num_experts * jax.random.normal(key_noise, logits.shape, logits.dtype)
        chosen = top_k_routing(logits, k, renormalize=renormalize, implementation=implementation)
        return plan_from_top_k(chosen, logits)

    return Layer(init, apply)
