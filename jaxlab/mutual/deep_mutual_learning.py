"""Deep Mutual Learning (2017, arXiv 1706.00384).

K networks train at once; each one fits the labels and the predictions of the others.

    L_k = CE(y, p_k) + weight / (K - 1) * sum_{l != k} KL(sg(p_l) || p_k)

p are softmax outputs and sg stops the gradient, so a peer is a teacher whose prediction is a constant. The paper
updates the networks one after the other within a mini-batch, each seeing the others' newest predictions. Here all
peers are updated at once from the predictions of the same step, so that one program serves one chip and a mesh with an
axis of peers (reconstructed). A `temperature` T other than 1 divides the logits of both sides and multiplies the term
by T^2 (reconstructed: the paper has T = 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mutual.peers import as_outputs, ensemble_probs, example_dims, peer_ids, peer_keys
from jaxlab.ops.collectives import all_mean, gather_rows, global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.types import Layer, Learner, LearnerState, StatefulLayer, as_stateful


def mutual_kl(
    logits: Array,
    peer_logits: Array,
    *,
    peers: Array | None = None,
    temperature: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the mean over peers and examples of the divergence from the peers' predictions to one's own.

    `T^2 / |L| * sum_{l in L} KL(softmax(z_l / T) || softmax(z / T))`, with the peers' side constant.

    Args:
        logits: float [N, C], one's own.
        peer_logits: float [K, N, C], of all candidates; no gradient reaches them.
        peers: bool [K], which of them teach; None = all. Nobody gives 0.
        temperature: T > 0.
        where: bool [N], real examples.
        axis_name: mesh axis over which the examples are spread.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); 0 if no example or no teacher exists.

    Raises:
        ValueError: shapes do not fit or temperature is not positive.

    Example:
        >>> z = jnp.array([[2.0, 0.0]])
        >>> float(mutual_kl(z, z[None]))
        0.0

    Source:
        Zhang, Xiang, Hospedales, Lu, arXiv 1706.00384, eqs. 3 and 8.
    """
    if logits.ndim != 2 or peer_logits.ndim != 3 or peer_logits.shape[1:] != logits.shape:
        raise ValueError(f"peer_logits must be [K, *{logits.shape}], got {peer_logits.shape}")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    keep = jnp.ones(logits.shape[0], bool) if where is None else where
    dtype = compute_dtype(logits)
    teach = jnp.ones(peer_logits.shape[0], bool) if peers is None else peers
    share = teach.astype(dtype) / jnp.maximum(jnp.sum(teach, dtype=dtype), 1)
    own = jax.nn.log_softmax(zero_where_false(logits, keep).astype(dtype) / temperature)
    others = jax.lax.stop_gradient(jnp.where(keep[None, :, None], peer_logits, jnp.zeros((), peer_logits.dtype)))
    others = jax.nn.log_softmax(others.astype(dtype) / temperature)
    terms = jnp.sum(jnp.exp(others) * (others - own[None]), axis=-1)
    return temperature**2 * global_mean(jnp.sum(share[:, None] * terms, axis=0), keep, axis_name=axis_name)


def deep_mutual_learning(
    net: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    num_peers: int = 2,
    weight: float | Callable[[Array], Array] = 1.0,
    temperature: float = 1.0,
    axis_name: str | None = None,
    data_axis_name: str | None = None,
) -> Learner:
    """Returns a learner that trains K networks on the labels and on each other's predictions.

    Args:
        net: network whose `apply` gives logits `[N, C]`, or a dict with `logits` and optionally a scalar `penalty` that
            is added to its peer's loss; further entries come back from `predict`.
        optimizer: applied to each peer on its own (every peer has its own optimiser state).
        num_peers: K >= 1; 1 is plain supervised training.
        weight: of the mutual term, a float or a function of the step (warm-up).
        temperature: of the mutual term.
        axis_name: mapped axis over which the peers are spread, K / axis size of them on each shard; None = all here.
        data_axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner`. `init(key, batch, params=None)`; every leaf of the state but `step` has a leading axis of local
        peers. `batch`: `x [N, ...]`, `y int [N]` (-1 = unlabelled, which leaves the mutual term), optional `where [N]`.
        `update` gives metrics `loss`, `accuracy`, `mutual_kl`, each `[local peers]`, and scalar `agreement`. `predict`
        gives `logits [local peers, N, C]`, `probs [N, C]` of the ensemble of all peers, and what else the net returns.

    Raises:
        ValueError: `num_peers` is below 1 or not divisible by the axis size.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> learner = deep_mutual_learning(mlp([3]), optax.sgd(0.1), num_peers=2)
        >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.array([0, 1, 2, 0])}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> state, metrics = jax.jit(learner.update)(state, batch, jax.random.key(1))
        >>> metrics["accuracy"].shape
        (2,)

    Source:
        Zhang, Xiang, Hospedales, Lu, Deep Mutual Learning, arXiv 1706.00384.
    """
    if num_peers < 1:
        raise ValueError(f"num_peers={num_peers} must be at least 1")
    net = as_stateful(net)

    def init(key, batch, *, params=None):
        keys = peer_keys(key, peer_ids(num_peers, axis_name=axis_name))
        dims = example_dims(batch["x"])
        made, net_state = jax.vmap(lambda k: net.init(k, dims))(keys) if params is None else (params, {})
        return LearnerState(made, net_state, jax.vmap(optimizer.init)(made), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        where = batch.get("where")
        where = jnp.ones(batch["y"].shape, bool) if where is None else where
        x, y = zero_where_false(batch["x"], where), batch["y"]
        ids = peer_ids(num_peers, axis_name=axis_name)
        keys = peer_keys(key, ids)
        labelled = where & (y >= 0)
        strength = weight(state.step) if callable(weight) else weight

        def total(params):
            outputs, net_state = jax.vmap(lambda p, s, k: net.apply(p, s, x, key=k, train=True), out_axes=0)(
                params, state.net_state, keys
            )
            outputs = as_outputs(outputs)
            logits = outputs["logits"]
            everyone = gather_rows(jax.lax.stop_gradient(logits), axis_name)

            def of_peer(logits, i):
                z = zero_where_false(logits, where).astype(compute_dtype(logits))
                ce = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
                ce = global_mean(ce, labelled, axis_name=data_axis_name)
                others = jnp.arange(num_peers) != i
                kl = mutual_kl(
                    logits, everyone, peers=others, temperature=temperature, where=where, axis_name=data_axis_name
                )
                right = global_mean((jnp.argmax(z, -1) == y).astype(jnp.float32), labelled, axis_name=data_axis_name)
                return ce + strength * kl, (kl, right)

            losses, (kl, accuracy) = jax.vmap(of_peer)(logits, ids)
            if "penalty" in outputs:
                losses = losses + all_mean(outputs["penalty"], data_axis_name)
            votes = jnp.argmax(everyone, axis=-1)
            agree = jnp.all(votes == votes[:1], axis=0).astype(jnp.float32)
            # Equal on all shards of peers already; the mean says so to shard_map.
            agreement = all_mean(global_mean(agree, where, axis_name=data_axis_name), axis_name)
            metrics = {
                "loss": losses,
                "accuracy": accuracy,
                "mutual_kl": kl,
                "agreement": agreement,
            }
            # Each peer's parameters occur in its own loss alone, so the gradient of the sum is each one's own.
            return jnp.sum(losses), (metrics, net_state)

        run = value_and_grad(total, axis_name=data_axis_name, has_aux=True)
        (_, (metrics, net_state)), grads = run(state.params)
        updates, opt_state = jax.vmap(optimizer.update)(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return LearnerState(params, net_state, opt_state, state.step + 1), metrics

    def predict(state, batch):
        outputs, _ = jax.vmap(lambda p, s: net.apply(p, s, batch["x"], train=False))(state.params, state.net_state)
        outputs = as_outputs(outputs)
        return {**outputs, "probs": ensemble_probs(outputs["logits"], axis_name=axis_name)}

    return Learner(init, update, predict)
