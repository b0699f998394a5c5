"""The router of Soft MoE: no choice at all, but means of tokens for a fixed number of slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlab.moe.plans import SlotPlan
from jaxlab.moe.routers._linear import clean_tokens
from jaxlab.ops.masked import masked_softmax, safe_normalize
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def soft_router(num_experts: int, slots: int = 1, *, normalize: bool = True) -> Layer:
    """Returns the router of Soft MoE: E experts of S slots each, all of which see a bit of every token.

    `z = unit(x) (scale unit(phi))`; `dispatch` is the softmax of z over tokens, `combine` that over all slots. Slot
    (e, s) is `sum_t dispatch x`, and token t gets `sum_es combine f_e(slot)`. Fully differentiable, nothing is dropped.
    The tokens of one call are one sequence, later ones included: no router for causal models; `vmap` over sequences.

    Args:
        num_experts: E.
        slots: S of each expert (the paper: as many slots in all as tokens, so that the cost is that of a dense layer).
        normalize: whether tokens and `phi` have unit length, with a learnt scale that starts at 1.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None)` gives a `SlotPlan`. With an `axis_name` in the
        layer, slots mix the tokens of one device.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> router = soft_router(3, 2)
        >>> plan = jax.jit(lambda key: router.apply(router.init(key, 8), jnp.ones((4, 8))))(jax.random.key(0))
        >>> plan.dispatch.shape, plan.dispatch[:, 0, 0].tolist()
        ((4, 3, 2), [0.25, 0.25, 0.25, 0.25])

    Source:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, arXiv 2308.00951, sections 2.1 and 2.3.
    """
    if num_experts < 1 or slots < 1:
        raise ValueError(f"num_experts={num_experts} and slots={slots} must be at least 1")

    def init(key, size):
        params = {"phi": jax.random.normal(key, (size, num_experts, slots)) * size**-0.5}
        return {**params, "scale": jnp.ones(())} if normalize else params

    def apply(params, x, *, where=None):
        x = clean_tokens(x, where)
        phi = params["phi"].astype(x.dtype)
        if normalize:
            x, phi = safe_normalize(x), params["scale"].astype(x.dtype) * safe_normalize(phi, axis=0)
        keep = jnp.ones(x.shape[0], bool) if where is None else where
        return rows_mixed(_plan)(x, phi, keep)

    return Layer(init, apply)


def _plan(x, phi, keep):
    logits = jnp.einsum("td,des->tes", x, phi, precision=jax.lax.Precision.HIGHEST)
    mask = keep[:, None, None]
    combine = jax.nn.softmax(logits.reshape(x.shape[0], -1), axis=1).reshape(logits.shape)
    return SlotPlan(
        dispatch=masked_softmax(logits, mask, axis=0),
        combine=jnp.where(mask, combine, jnp.zeros((), logits.dtype)),
        logits=logits,
        where=keep,
    )
