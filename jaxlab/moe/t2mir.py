"""Mixture-of-Experts Meets In-Context Reinforcement Learning (T2MIR, 2025, arXiv 2506.05426).

In a transformer that learns reinforcement learning in context, a feed-forward layer becomes two mixtures side by side.
One routes by token (states, actions and rewards differ) and is balanced; the other routes by task, and its router is
trained so that trajectories of one task have one representation: information about the task is contrasted into it.

    y        = [token mixture(x), task mixture(x)],  both d -> d / 2, k experts each, leaky ReLU
    gate     logits = tanh(x w) v; weights = softmax over the k largest; the token gate has learnt noise in training
    q, k     mean over tokens of softmax(logits) of the task gate; k from its average over the steps (EMA, 0.005)
    contrast (row i of both halves comes from one task)  S = q_1 W k_2',  S' = q_2 W k_1'
             loss = (CE(S, i) + CE(S', i)) / 2
    total    = policy loss + 0.1 (CV^2(importance) + CV^2(load)) of the token gate + 0.01 contrast

Darkroom: d = 64, 6 token and 12 task experts, k = 2, widths 768 / 6 and 1536 / 12, in the last of 4 layers. Gates are
`noisy_top_k_router(hidden=True)`, balance losses `importance_loss` and `load_loss`, the average is `ops.ema_update`.

In the release a test of the load compares the noise instead of the noisy logit with the threshold: not followed.
Reconstructed: masks; the weights' initial scale (a uniform one of the same variance officially).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.experts import layer_experts
from jaxlab.moe.routers import noisy_top_k_router
from jaxlab.ops.collectives import gather_rows, global_mean, match_varying
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_mean, masked_softmax
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def t2mir_ffn(
    *,
    token_experts: int = 6,
    task_experts: int = 12,
    token_k: int = 2,
    task_k: int = 2,
    token_width: int = 768,
    task_width: int = 1536,
) -> Layer:
    """Returns the layer of a token-wise and a task-wise mixture side by side, each with half of the features.

    Args:
        token_experts: number of experts of the token-wise mixture.
        task_experts: number of experts of the task-wise mixture.
        token_k: experts per token in the first.
        task_k: experts per token in the second, which has no noise.
        token_width: hidden units of all experts together, a multiple of their number.
        task_width: likewise.

    Returns:
        A `Layer`: `init(key, d)` with d even, `apply(params, x [T, d], where=None, key=None, train=False)` gives
        `(y [T, d], plans)`, `plans` a dict of a `NoisyPlan` for each of `token` and `task`. `params` is a dict of both
        names, each of `router` and `experts`. Tokens that do not exist give 0.

    Raises:
        ValueError: an option is out of range; in `init`, d is odd; in `apply`, training lacks a key.

    Example:
        >>> layer = t2mir_ffn(token_experts=2, task_experts=2, token_width=4, task_width=4)
        >>> run = lambda key: layer.apply(layer.init(key, 6), jnp.ones((3, 6)))
        >>> y, plans = jax.eval_shape(run, jax.random.key(0))
        >>> y.shape, plans["task"].logits.shape
        ((3, 6), (3, 2))

    Source:
        Wu et al., arXiv 2506.05426, section 4; code NJU-RL/T2MIR.
    """
    sizes = {"token": (token_experts, token_k, token_width), "task": (task_experts, task_k, task_width)}
    for name, (experts, k, width) in sizes.items():
        if not 1 <= k <= experts:
            raise ValueError(f"{name}_k={k} must be between 1 and {name}_experts={experts}")
        if width < experts or width % experts:
            raise ValueError(f"{name}_width={width} must be a multiple of {name}_experts={experts}")
    routers = {name: noisy_top_k_router(experts, k, hidden=True) for name, (experts, k, _) in sizes.items()}
    experts = {name: layer_experts(number, _half(width // number)) for name, (number, _, width) in sizes.items()}

    def init(key, size):
        if size % 2:
            raise ValueError(f"d={size} must be even: each mixture gives half of the features")
        keys = dict(zip(sizes, jax.random.split(key), strict=True))
        params = {}
        for name, own in keys.items():
            key_router, key_experts = jax.random.split(own)
            params[name] = {
                "router": routers[name].init(key_router, size),
                "experts": experts[name].init(key_experts, size),
            }
        return params

    def apply(params, x, *, where=None, key=None, train=False):
        if train and key is None:
            raise ValueError("key is needed: the token router is noisy in training")
        plans = {
            "token": routers["token"].apply(params["token"]["router"], x, where=where, key=key, train=train),
            "task": routers["task"].apply(params["task"]["router"], x, where=where),
        }
        halves = [experts[name].apply(params[name]["experts"], x, plans[name]) for name in sizes]
        return jnp.concatenate(halves, axis=1), plans

    return Layer(init, apply)


def router_representation(logits: Array, *, where: Array | None = None) -> Array:
    """Returns what the task router thinks of each sequence: the mean over its tokens of the softmax of the logits.

    Args:
        logits: float [..., T, E], of a plan, brought into sequences.
        where: bool [..., T], tokens that exist.

    Returns:
        [..., E] in the dtype of `logits`; sums to 1, or 0 for a sequence without tokens.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> jax.jit(router_representation)(jnp.array([[[0.0, 0.0], [1e4, 0.0]]])).tolist()
        [[0.75, 0.25]]
    """
    if logits.ndim < 2 or (where is not None and where.shape != logits.shape[:-1]):
        shape = None if where is None else where.shape
        raise ValueError(f"logits and where must be [..., T, E] and [..., T], got {logits.shape} and {shape}")
    keep = jnp.ones(logits.shape[:-1], bool) if where is None else where
    probs = masked_softmax(logits.astype(compute_dtype(logits)), keep[..., None])
    return masked_mean(probs, keep, axis=-2).astype(logits.dtype)


def router_contrastive_loss(
    queries: Array, keys: Array, weights: Array, *, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns the loss of telling, by the router's representation, which trajectory is of the same task.

    `(1 / 2) sum over both views of mean_i CE(q_vi W k_wj', i)`, w the other view; the other tasks are the negatives.

    Args:
        queries: float [2, N, E], representations of two trajectories of each of N tasks.
        keys: float [2, N, E], of the averaged router; a constant.
        weights: float [E, E], W, learnt from N(0, 1).
        where: bool [N], tasks that exist.
        axis_name: mapped axis over which the tasks are spread: negatives come from all shards.

    Returns:
        Scalar in the dtype of accumulation, log N at constant representations; 0 without tasks.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> sure = jnp.stack([jnp.eye(3)] * 2)
        >>> round(float(jax.jit(router_contrastive_loss)(sure, sure, 50 * jnp.eye(3))), 4)
        0.0

    Source:
        Wu et al., arXiv 2506.05426, section 4.3; code NJU-RL/T2MIR.
    """
    if queries.ndim != 3 or queries.shape[0] != 2 or keys.shape != queries.shape:
        raise ValueError(f"queries and keys must both be [2, N, E], got {queries.shape} and {keys.shape}")
    if weights.shape != (queries.shape[2],) * 2:
        raise ValueError(f"weights has shape {weights.shape}, expected {(queries.shape[2],) * 2}")
    if where is not None and where.shape != queries.shape[1:2]:
        raise ValueError(f"where has shape {where.shape}, expected {queries.shape[1:2]}")
    keep = jnp.ones(queries.shape[1], bool) if where is None else where
    terms = rows_mixed(_contrast)(queries, jax.lax.stop_gradient(keys), weights, keep, axis_name=axis_name)
    return global_mean(terms, keep, axis_name=axis_name)


def _half(width: int) -> Layer:
    def init(key, size):
        key_up, key_down = jax.random.split(key)
        scale = lambda inputs: (3 * inputs) ** -0.5
        return {
            "up": jax.random.normal(key_up, (size, width)) * scale(size),
            "up_bias": jnp.zeros(width),
            "down": jax.random.normal(key_down, (width, size // 2)) * scale(width),
            "down_bias": jnp.zeros(size // 2),
        }

    def apply(params, x):
        def affine(x, name):
            y = jnp.matmul(x, params[name].astype(x.dtype), preferred_element_type=compute_dtype(x))
            return (y + params[f"{name}_bias"].astype(y.dtype)[None]).astype(x.dtype)

        return affine(jax.nn.leaky_relu(affine(x, "up")), "down")

    return Layer(init, apply)


def _contrast(queries, keys, weights, keep, *, axis_name):
    """Returns the mean over both views of each task's cross entropy [N]."""
    dtype = compute_dtype(queries)
    clean = lambda a: jnp.where(keep[None, :, None], a, jnp.zeros((), a.dtype)).astype(dtype)
    everyone = jnp.moveaxis(gather_rows(jnp.moveaxis(clean(keys), 1, 0), axis_name), 0, 1)
    exist = gather_rows(keep, axis_name)[None, :]
    queries, weights = match_varying(clean(queries), weights.astype(dtype))
    product = lambda *a: jnp.einsum("ne,ef,mf->nm", *a, precision=jax.lax.Precision.HIGHEST)
    total = jnp.zeros_like(queries[0, :, 0])
    for view in (0, 1):
        scores = product(queries[view], weights, everyone[1 - view])
        positive = jnp.einsum(
            "ne,ef,nf->n", queries[view], weights, clean(keys)[1 - view], precision=jax.lax.Precision.HIGHEST
        )
        every = masked_logsumexp(scores, jnp.broadcast_to(exist, scores.shape))
        total = total + jnp.where(keep, jnp.where(jnp.isfinite(every), every, 0.0) - positive, 0.0) / 2
    return total
