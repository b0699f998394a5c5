"""The noisy top-k gate, whose load is a smooth function of its logits, and the loss of that load."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.moe.balance import squared_variation
from jaxlab.moe.plans import _fields
from jaxlab.moe.routers._linear import clean_tokens
from jaxlab.ops.collectives import all_sum
from jaxlab.types import Layer, RoutingPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyPlan(RoutingPlan):
    """A routing plan with the expected number of tokens of each expert.

    Attributes:
        load: float32 [E], in training the sum over tokens of the probability that another draw of the noise of this
            expert alone would choose it; otherwise the counts, without gradient.
    """

    load: Array


def noisy_top_k_router(num_experts: int, k: int = 2, *, hidden: bool = False, eps: float = 1e-2) -> Layer:
    """Returns the router whose logits get learnt noise in training: `H = z + N(0, 1) (softplus(x w_noise) + eps)`.

    The weights are the softmax over the k largest H alone. Without noise in evaluation. Losses of its balance:
    `importance_loss` and `load_loss`.

    Args:
        num_experts: E.
        k: experts per token, 1 to E.
        hidden: whether z = tanh(x w) v with v [E, E], as in T2MIR, instead of x w.
        eps: >= 0, least standard deviation of the noise.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, key=None, train=False)` gives a `NoisyPlan` of A
        = T k assignments. `logits` are z; `scores` the softmax of z over all experts.

    Raises:
        ValueError: an option is out of range, or training lacks a key.

    Example:
        >>> router = noisy_top_k_router(4, 2)
        >>> run = lambda key: router.apply(router.init(key, 8), jnp.ones((3, 8)), key=key, train=True)
        >>> plan = jax.jit(run)(jax.random.key(0))
        >>> sum(plan.counts.tolist()), plan.load.shape
        (6, (4,))

    Source:
        Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538, section 2.1 and appendix A.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
    if eps < 0:
        raise ValueError(f"eps={eps} must be at least 0")

    def init(key, size):
        key_w, key_v = jax.random.split(key)
        params = {
            "w": jax.random.normal(key_w, (size, num_experts)) * size**-0.5,
            "noise": jnp.zeros((size, num_experts)),
        }
        if hidden:
            params["v"] = jax.random.normal(key_v, (num_experts, num_experts)) * num_experts**-0.5
        return params

    def apply(params, x, *, where=None, key=None, train=False):
        if train and key is None:
            raise ValueError("key is needed: this router is noisy in training")
        x = clean_tokens(x, where)
        clean = x @ params["w"].astype(x.dtype)
        if hidden:
            clean = jnp.tanh(clean) @ params["v"].astype(x.dtype)
        keep = jnp.ones(x.shape[0], bool) if where is None else where
        noisy = clean
        if train:
            deviation = jax.nn.softplus(x @ params["noise"].astype(x.dtype)) + eps
            noisy = clean + deviation * jax.random.normal(key, clean.shape, clean.dtype)
        # The softmax over the chosen is the softmax over all, divided by the sum of the chosen.
        chosen = top_k_routing(noisy, k, renormalize=True, where=where)
        probs = jnp.where(keep[:, None], jax.nn.softmax(clean, axis=1), jnp.zeros((), x.dtype))
        plan = plan_from_top_k(dataclasses.replace(chosen, probs=probs), clean)
        if train and k < num_experts:
            likely = jnp.where(keep[:, None], _chosen_again(clean, noisy, deviation, k), 0.0)
            load = jnp.sum(likely, axis=0)
        else:
            load = plan.counts.astype(x.dtype)
        return NoisyPlan(**_fields(plan), load=load)

    return Layer(init, apply)


def load_loss(plan: NoisyPlan, *, axis_name: str | None = None) -> Array:
    """Returns the squared coefficient of variation of the smooth load, `Var(load) / Mean(load)^2`.

    Args:
        plan: of `noisy_top_k_router` in training (else it has no gradient).
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 without tokens.

    Raises:
        ValueError: the plan has no load.

    Example:
        >>> router = noisy_top_k_router(2, 1)
        >>> plan_of = lambda x: router.apply({"w": jnp.array([[1.0, 0.0]]), "noise": jnp.zeros((1, 2))}, x)
        >>> float(jax.jit(lambda x: load_loss(plan_of(x)))(jnp.ones((4, 1))))
        1.0

    Source:
        Shazeer et al., arXiv 1701.06538, appendix A, eq. 8 to 11 (before its weight).
    """
    if not isinstance(plan, NoisyPlan):
        raise ValueError(f"plan must be a NoisyPlan, which has a load, got {type(plan).__name__}")
    return squared_variation(all_sum(plan.load, axis_name))


def _chosen_again(clean, noisy, deviation, k):
    """Returns the probability [T, E] that an expert is among the k best with new noise of its own."""
    top, _ = jax.lax.top_k(noisy, k + 1)
    inside = noisy > top[:, k : k + 1]
    # What an expert has to beat: the k-th best of the others.
    threshold = jnp.where(inside, top[:, k : k + 1], top[:, k - 1 : k])
    return jax.scipy.stats.norm.cdf((clean - threshold) / deviation)
