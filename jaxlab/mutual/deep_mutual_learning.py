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

from jaxlab.mutual.peers import peers
from jaxlab.ops.collectives import global_mean
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.types import Layer, Learner, StatefulLayer


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
        >>> float(jax.jit(mutual_kl)(z, z[None]))
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


def mutual_objective(
    *,
    direction: str = "one_way",
    temperature: float = 1.0,
    features: str | None = None,
    feature_weight: float = 1.0,
    axis_name: str | None = None,
) -> Callable[..., Array]:
    """Returns the mutual term of `peers`: how far a peer's predictions, and its features, are from those of the others.

    Mean over the teachers l of `KL(p_l || p_k)`, of `KL(p_k || p_l)`, or of half their sum, and with features the
    feature weight times `|f_k / |f_k| - f_l / |f_l||^2`. The teachers' side is constant.

    Args:
        direction: "one_way", "reverse" or "symmetric".
        temperature: T > 0, divides the logits of both sides; the term is multiplied by its square.
        features: entry of the outputs, float [N, D], which must be among those exchanged; None = no such term.
        feature_weight: of the features' term.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        `mutual(outputs, everyone, teach, batch)`, a scalar in the accumulation dtype; 0 without teacher or example.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> term = jax.jit(mutual_objective(direction="symmetric"))
        >>> z = jnp.array([[2.0, 0.0]])
        >>> batch = {"where": jnp.ones(1, bool)}
        >>> round(float(term({"logits": z}, {"logits": -z[None]}, jnp.ones(1, bool), batch)), 4)
        1.5232

    Source:
        Zhang, Xiang, Hospedales, Lu, arXiv 1706.00384 (one way, and the symmetric form that it mentions).
    """
    if direction not in ("one_way", "reverse", "symmetric"):
        raise ValueError(f"direction={direction!r} must be 'one_way', 'reverse' or 'symmetric'")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")

    def backward(logits, others, share, where):
        """The mean of KL(p_k || p_l), with the gradient of the one in front."""
        own = jax.nn.log_softmax(zero_where_false(logits, where).astype(share.dtype) / temperature)
        said = jax.nn.log_softmax(jnp.where(where[None, :, None], others, 0.0).astype(share.dtype) / temperature)
        terms = jnp.sum(jnp.exp(own)[None] * (own[None] - said), axis=-1)
        terms = jnp.sum(share[:, None] * terms, axis=0)
        return temperature**2 * global_mean(terms, where, axis_name=axis_name)

    def mutual(outputs, everyone, teach, batch):
        logits, where = outputs["logits"], batch["where"]
        others = jax.lax.stop_gradient(everyone["logits"])
        dtype = compute_dtype(logits)
        share = teach.astype(dtype) / jnp.maximum(jnp.sum(teach, dtype=dtype), 1)
        term = jnp.zeros((), dtype)
        if direction != "reverse":
            options = {"peers": teach, "temperature": temperature, "where": where, "axis_name": axis_name}
            term += mutual_kl(logits, others, **options)
        if direction != "one_way":
            term += backward(logits, others, share, where)
        term = term / 2 if direction == "symmetric" else term
        if features is not None:
            own = safe_normalize(zero_where_false(outputs[features], where).astype(dtype))
            said = jnp.where(where[None, :, None], jax.lax.stop_gradient(everyone[features]), 0.0).astype(dtype)
            apart = jnp.sum(jnp.square(own[None] - safe_normalize(said)), axis=-1)
            apart = jnp.sum(share[:, None] * apart, axis=0)
            term += feature_weight * global_mean(apart, where, axis_name=axis_name)
        return term

    return mutual


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
        `update` gives metrics `loss`, `accuracy`, `mutual_kl`, each `[local peers]`, and the scalars `agreement` and
        `ensemble_accuracy`, see `peers`. `predict`
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
    learner = peers(
        net,
        optimizer,
        num_peers=num_peers,
        mutual=mutual_objective(temperature=temperature, axis_name=data_axis_name),
        weight=weight,
        axis_name=axis_name,
        data_axis_name=data_axis_name,
    )

    def update(state, batch, key):
        state, metrics = learner.update(state, batch, key)
        return state, {("mutual_kl" if name == "mutual" else name): value for name, value in metrics.items()}

    return Learner(learner.init, update, learner.predict)
