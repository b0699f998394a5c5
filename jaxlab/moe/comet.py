"""COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search (2023, arXiv 2306.02824).

k soft decision trees route each token. Their splits are smooth steps, exactly 0 or 1 outside a band: the gate is
continuous and trains from the first step, and once the splits have settled each tree reaches one leaf, which is one
expert, so that at most k experts have a weight above 0. Any number of experts, not only powers of 2.

    p_ij   = S(x z_ij + c_ij)                      inner node i of tree j, the probability of going left
    P_je   = product of p or 1 - p on the way to leaf e, leaves from left to right
    s_je   = x v_je + b_je + log(P_je + eps)       if P_je > threshold, otherwise -infinity
    w_e    = sum_j softmax over ALL k E of s       (sums to 1; exactly 0 where no tree reaches e)

In training `selector_entropy` of the plan is added to the loss. COMET+ relearns which expert sits on which leaf:
`permutation_search(comet_gate(...))`.

Two official gates exist. The original (TensorFlow) has biases in the splits, eps = 1e-8 and masks only P = 0: the
defaults. Its PyTorch port has `selector_bias=False, eps=1e-6, threshold=1e-5`, and leaf biases that start at 0.

Reconstructed: the masks; the plan's room (`max_active`), since the official layers evaluate every expert; `logits`, the
logarithm of the summed gate up to a constant of the token. The original's L2 penalty on V is left to the optimiser.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlab.moe.plans import plan_from_gates
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_softmax, zero_where_false
from jaxlab.ops.soft_trees import smooth_step, soft_tree_leaves
from jaxlab.types import Layer


def comet_gate(
    num_experts: int,
    k: int = 2,
    *,
    width: float = 1.0,
    selector_bias: bool = True,
    eps: float = 1e-8,
    threshold: float = 0.0,
    max_active: int | None = None,
) -> Layer:
    """Returns a router of k soft trees a token, which selects at most k experts once its splits have settled.

    `w_e = sum_j softmax(x v_je + b_je + log(P_je + eps))`, P_je the probability of leaf e in tree j (see the module).

    Args:
        num_experts: E, any number.
        k: number of trees, 1 to E; the cardinality of the settled gate.
        width: > 0, of the smooth step (gamma; the paper tunes it from 0.01 to 10, its code starts from 1).
        selector_bias: whether splits have a bias.
        eps: > 0, inside the logarithm.
        threshold: in [0, 1), leaves of at most this probability are masked.
        max_active: room of the plan for each token. None = E, dense, in which nothing is ever cut; k once the gate has
            settled. What does not fit is dropped (smallest weights first, the others unchanged) and counted.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None)` gives a `GatePlan` of A = T `max_active`
        assignments, of which those of weight 0 are unused; `plan.selectors` are the leaf probabilities [T, k, E].
        Arithmetic is at least float32.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> router = comet_gate(5, 2)
        >>> plan = jax.jit(lambda key, x: router.apply(router.init(key, 8), x))
        >>> soft, hard = (plan(jax.random.key(0), jnp.full((3, 8), size)) for size in (1.0, 1e6))
        >>> sum(soft.counts.tolist()), sum(hard.counts.tolist()) <= 6
        (15, True)

    Source:
        Ibrahim et al., arXiv 2306.02824, section 3; official TensorFlow and PyTorch code.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
    if not width > 0 or not eps > 0:
        raise ValueError(f"width={width} and eps={eps} must be positive")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold} must be at least 0 and below 1")
    if max_active is not None and not 1 <= max_active <= num_experts:
        raise ValueError(f"max_active={max_active} must be between 1 and num_experts={num_experts}")

    def init(key, size):
        def uniform(key, shape, limit):
            return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

        key_z, key_c, key_v, key_b = jax.random.split(key, 4)
        splits = {"w": uniform(key_z, (size, k, num_experts - 1), width / 100)}
        if selector_bias:
            splits["b"] = uniform(key_c, (k, num_experts - 1), width / 100)
        bias = uniform(key_b, (k, num_experts), 0.05) if selector_bias else jnp.zeros((k, num_experts))
        return {"splits": splits, "leaves": {"w": uniform(key_v, (size, k, num_experts), 0.05), "b": bias}}

    def apply(params, x, *, where=None):
        if x.ndim != 2:
            raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
        x = zero_where_false(x, where)
        x = x.astype(compute_dtype(x))
        leaves = soft_tree_leaves(smooth_step(_affine(params["splits"], x), width=width))
        reached = leaves > threshold
        scores = _affine(params["leaves"], x) + jnp.log(jnp.where(reached, leaves + eps, 1.0))
        flat = (x.shape[0], k * num_experts)
        gates = masked_softmax(scores.reshape(flat), reached.reshape(flat)).reshape(scores.shape)
        logits = masked_logsumexp(scores, reached, axis=1)
        logits = jnp.where(reached.any(axis=1), logits, jnp.finfo(logits.dtype).min)
        return plan_from_gates(gates, leaves, logits, max_active=max_active, where=where)

    return Layer(init, apply)


def _affine(params, x):
    y = jnp.einsum("td,dke->tke", x, params["w"].astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    return y + params["b"].astype(x.dtype)[None] if "b" in params else y
