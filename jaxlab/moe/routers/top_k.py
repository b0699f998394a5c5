"""The softmax or sigmoid router of most mixtures: each token goes to its k most probable experts."""

from __future__ import annotations

import jax

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.moe.routers._linear import clean_tokens, linear, linear_init
from jaxlab.types import Layer


def top_k_router(
    num_experts: int,
    k: int = 2,
    *,
    score_function: str = "softmax",
    groups: int | None = None,
    groups_kept: int | None = None,
    per_group: bool = False,
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
        score_function: "softmax" or "sigmoid".
        groups: number of equal groups of neighbouring experts; needs `groups_kept` or `per_group`.
        groups_kept: choose only within the best groups of each token (DeepSeek-V3).
        per_group: choose k / groups experts in each group (MoGE).
        renormalize: whether the k weights of a token sum to 1.
        noise: standard deviation of the noise on the logits, times E.
        jitter: relative half-width of the multiplicative noise on the input.
        implementation: as in `kernels.top_k_routing`.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, key=None, train=False)` gives a `RoutingPlan` of
        A = T k assignments.

    Raises:
        ValueError: k or a group option is out of range, or noise is asked for in training without a key.

    Example:
        >>> router = top_k_router(4, 2)
        >>> plan = jax.jit(lambda key: router.apply(router.init(key, 8), jnp.ones((3, 8))))(jax.random.key(0))
        >>> sum(plan.counts.tolist())
        6
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function={score_function!r} must be 'softmax' or 'sigmoid'")

    def apply(params, x, *, where=None, key=None, train=False):
        noisy = train and (noise > 0 or jitter > 0)
        if noisy and key is None:
            raise ValueError("key is needed: this router is noisy in training")
        x = clean_tokens(x, where)
        if noisy:
            key_noise, key_jitter = jax.random.split(key)
            if jitter > 0:
                x = x * jax.random.uniform(key_jitter, x.shape, x.dtype, minval=1 - jitter, maxval=1 + jitter)
        logits = linear(params, x)
        if noisy and noise > 0:
            logits = logits + noise / num_experts * jax.random.normal(key_noise, logits.shape, logits.dtype)
        chosen = top_k_routing(
            logits,
            k,
            groups=groups,
            groups_kept=groups_kept,
            per_group=per_group,
            renormalize=renormalize,
            score_function=score_function,
            where=where,
            implementation=implementation,
        )
        return plan_from_top_k(chosen, logits)

    return Layer(linear_init(num_experts), apply)
