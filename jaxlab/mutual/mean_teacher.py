"""Networks taught by moving averages of networks: one network by its own average, K peers by each other's.

A student learns from labels and from a teacher whose parameters are the exponential moving average of a student's.

    teacher <- a_t teacher + (1 - a_t) student,   a_t = min(1 - 1 / (t + 1), decay)        (t steps were taken before)
    L_k     = CE(y, p_k) + weight * mean over teachers j of consistency(p_k, sg(p_j))

With one network (Mean Teachers, arXiv 1703.01780) the teacher is its own average, which sees another augmentation. With
K networks (Mutual Mean-Teaching, arXiv 2001.01526) the teachers are the averages of the others, each of which sees what
its student sees. Another `objective` replaces L_k. The ramp of a_t is that of both official codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mutual.peers import as_outputs, ensemble_probs, example_dims, peer_ids, peer_keys
from jaxlab.ops.collectives import all_mean, gather_rows, global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.trees import ema_update
from jaxlab.types import Layer, Learner, LearnerState, PyTree, StatefulLayer, as_stateful


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanTeacherState(LearnerState):
    """State of `mean_teacher`; every leaf but `step` has a leading axis of local peers.

    Attributes:
        teacher_params: moving average of `params`.
        teacher_state: what the averaged networks remember (statistics of their own forward passes).
    """

    teacher_params: PyTree
    teacher_state: PyTree


def mean_teacher(
    net: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    num_peers: int = 1,
    decay: float = 0.999,
    weight: float | Callable[[Array], Array] = 1.0,
    kind: str = "mse",
    objective: Callable[..., tuple[Array, dict[str, Array]]] | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
    axis_name: str | None = None,
    data_axis_name: str | None = None,
) -> Learner:
    """Returns a learner that trains K networks on the labels and on averaged networks.

    Args:
        net: network whose `apply` gives logits `[N, C]`, or a dict with `logits`, optionally a scalar `penalty` that is
            added to its peer's loss, and what else the objective reads.
        optimizer: applied to each peer on its own.
        num_peers: K >= 1; with 1 the teacher is the network's own average, with more those of the others.
        decay: of the average, in [0, 1]; at step t it is at most `1 - 1 / (t + 1)`, so that the start is forgotten.
        weight: of the consistency term, a float or a function of the step (see `ramp_up`).
        kind: of the consistency term, see `consistency_loss`.
        objective: replaces cross entropy and consistency: `objective(outputs, teachers, batch, teach, step)` gives
            `(loss, metrics)` from one network's outputs, all K averaged networks' outputs (leading axis K, constant),
            the batch (with `where`), bool `teach [K]` and the step.
        augment: `augment(key, x)`; each peer draws its own view.
        axis_name: mapped axis over which the peers are spread, K / axis size of them on each shard; None = all here.
            Only outputs of the averaged networks cross it.
        data_axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `MeanTeacherState`. `init(key, batch, params=None, net_state=None)`; `batch`: `x [N, ...]`,
        `y int [N]` (-1 = unlabelled, which leaves the other term), optional `where [N]`. `update` gives metrics `loss`,
        `accuracy` and the objective's (by default `consistency`), each `[local peers]`. `predict` asks the averaged
        networks: their outputs `[local peers, N, ...]` and `probs [N, C]`, the mean over all of them.

    Raises:
        ValueError: `num_peers` is below 1 or not divisible by the axis size, `decay` or `kind` is out of range.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> learner = mean_teacher(mlp([3]), optax.sgd(0.1))
        >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.array([0, 1, 2, -1])}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> state, metrics = jax.jit(learner.update)(state, batch, jax.random.key(1))
        >>> sorted(metrics)
        ['accuracy', 'consistency', 'loss']

    Source:
        Tarvainen, Valpola, arXiv 1703.01780 (mse, decay 0.999); Ge, Chen, Li, arXiv 2001.01526 (peers). Reconstructed:
        more than two peers, whose teachers are averaged over.
    """
    if num_peers < 1:
        raise ValueError(f"num_peers={num_peers} must be at least 1")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must be between 0 and 1")
    _check_kind(kind)
    net = as_stateful(net)

    def supervised(outputs, teachers, batch, teach, step):
        logits, where = outputs["logits"], batch["where"]
        z = zero_where_false(logits, where).astype(compute_dtype(logits))
        ce = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(batch["y"], 0))
        ce = global_mean(ce, where & (batch["y"] >= 0), axis_name=data_axis_name)

        def from_teacher(teacher):
            return consistency_loss(logits, teacher, kind=kind, where=where, axis_name=data_axis_name)

        share = teach.astype(ce.dtype) / jnp.sum(teach, dtype=ce.dtype)
        consistency = jnp.sum(share * jax.vmap(from_teacher)(teachers["logits"]))
        strength = weight(step) if callable(weight) else weight
        return ce + strength * consistency, {"consistency": consistency}

    criterion = supervised if objective is None else objective

    def forward(params, net_state, x, keys, view_keys):
        def one(params, net_state, key, view_key):
            seen = x if augment is None else augment(view_key, x)
            return net.apply(params, net_state, seen, key=key, train=True)

        outputs, net_state = jax.vmap(one)(params, net_state, keys, view_keys)
        return as_outputs(outputs), net_state

    def init(key, batch, *, params=None, net_state=None):
        if params is None:
            keys, dims = peer_keys(key, peer_ids(num_peers, axis_name=axis_name)), example_dims(batch["x"])
            params, net_state = jax.vmap(lambda k: net.init(k, dims))(keys)
        net_state = {} if net_state is None else net_state
        # The average is a copy: a caller that donates the state gives every buffer away once.
        teacher = jax.tree.map(jnp.copy, (params, net_state))
        return MeanTeacherState(params, net_state, jax.vmap(optimizer.init)(params), jnp.zeros((), jnp.int32), *teacher)

    def update(state, batch, key):
        where = batch.get("where")
        where = jnp.ones(batch["y"].shape, bool) if where is None else where
        x, y = zero_where_false(batch["x"], where), batch["y"]
        full = {**batch, "x": x, "where": where}
        ids = peer_ids(num_peers, axis_name=axis_name)
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(peer_keys(key, ids))
        own_keys, teacher_keys, views, other_views = (keys[:, i] for i in range(4))
        seen = views if num_peers > 1 else other_views
        taught, teacher_state = forward(state.teacher_params, state.teacher_state, x, teacher_keys, seen)
        taught = {name: value for name, value in taught.items() if name != "penalty"}
        teachers = jax.tree.map(lambda a: gather_rows(jax.lax.stop_gradient(a), axis_name), taught)

        def total(params):
            outputs, net_state = forward(params, state.net_state, x, own_keys, views)

            def of_peer(outputs, i):
                teach = jnp.arange(num_peers) != i if num_peers > 1 else jnp.ones(1, bool)
                loss, metrics = criterion(outputs, teachers, full, teach, state.step)
                right = (jnp.argmax(outputs["logits"], -1) == y).astype(jnp.float32)
                accuracy = global_mean(right, where & (y >= 0), axis_name=data_axis_name)
                return loss, {**metrics, "accuracy": accuracy}

            penalty = outputs.pop("penalty", None)
            losses, metrics = jax.vmap(of_peer)(outputs, ids)
            losses = losses if penalty is None else losses + all_mean(penalty, data_axis_name)
            # Each peer's parameters occur in its own loss alone, so the gradient of the sum is each one's own.
            return jnp.sum(losses), ({"loss": losses, **metrics}, net_state)

        run = value_and_grad(total, axis_name=data_axis_name, has_aux=True)
        (_, (metrics, net_state)), grads = run(state.params)
        updates, opt_state = jax.vmap(optimizer.update)(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.minimum(1 - 1 / (state.step.astype(jnp.float32) + 1), decay)
        teacher_params = ema_update(state.teacher_params, params, decay=rate)
        new = MeanTeacherState(params, net_state, opt_state, state.step + 1, teacher_params, teacher_state)
        return new, metrics

    def predict(state, batch):
        outputs, _ = jax.vmap(lambda p, s: net.apply(p, s, batch["x"], train=False))(
            state.teacher_params, state.teacher_state
        )
        outputs = as_outputs(outputs)
        return {**outputs, "probs": ensemble_probs(outputs["logits"], axis_name=axis_name)}

    return Learner(init, update, predict)


def consistency_loss(
    logits: Array,
    teacher_logits: Array,
    *,
    kind: str = "mse",
    temperature: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far a prediction is from its teacher's, which is a constant.

    With p and q the softmax of the logits and of the teacher's, both divided by T:
    `mse`: `mean_c (p_c - q_c)^2`; `kl`: `T^2 KL(q || p)`; `cross_entropy`: `-T^2 sum_c q_c log p_c`.

    Args:
        logits: float [N, C].
        teacher_logits: float [N, C]; no gradient reaches them.
        kind: "mse", "kl" or "cross_entropy".
        temperature: T > 0.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), 0 without any example; or `[N]` in the dtype of
        `logits`.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> float(jax.jit(consistency_loss)(jnp.zeros((1, 2)), jnp.array([[50.0, 0.0]])))
        0.25

    Source:
        Tarvainen, Valpola, arXiv 1703.01780 (mse); Ge, Chen, Li, arXiv 2001.01526, eq. 6 (cross entropy).
    """
    if logits.ndim != 2 or teacher_logits.shape != logits.shape:
        raise ValueError(f"logits and teacher_logits must both be [N, C], got {logits.shape}, {teacher_logits.shape}")
    if where is not None and where.shape != logits.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {logits.shape[:1]}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    _check_kind(kind)
    dtype = compute_dtype(logits, teacher_logits)
    log_p = jax.nn.log_softmax(zero_where_false(logits, where).astype(dtype) / temperature)
    teacher = zero_where_false(jax.lax.stop_gradient(teacher_logits), where)
    log_q = jax.nn.log_softmax(teacher.astype(dtype) / temperature)
    if kind == "mse":
        terms = jnp.mean(jnp.square(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)
    else:
        surplus = log_q - log_p if kind == "kl" else -log_p
        terms = temperature**2 * jnp.sum(jnp.exp(log_q) * surplus, axis=-1)
    return reduce_terms(terms, where, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def ramp_up(step: Array, *, length: float, value: float = 1.0) -> Array:
    """Returns `value * exp(-5 (1 - min(step / length, 1))^2)`, which grows from nearly 0 to `value`.

    Args:
        step: int or float [...].
        length: > 0, steps until `value` is reached.
        value: at the end.

    Returns:
        float32 [...] (float64 for float64 steps).

    Raises:
        ValueError: `length` is not positive.

    Example:
        >>> [round(float(ramp_up(jnp.array(s), length=10)), 3) for s in (0, 5, 10, 99)]
        [0.007, 0.287, 1.0, 1.0]

    Source:
        Laine, Aila, arXiv 1610.02242; used by Tarvainen, Valpola, arXiv 1703.01780.
    """
    if not length > 0:
        raise ValueError(f"length={length} must be positive")
    step = jnp.asarray(step)
    left = 1 - jnp.clip(step.astype(compute_dtype(step)) / length, 0.0, 1.0)
    return value * jnp.exp(-5.0 * jnp.square(left))


def _check_kind(kind):
    if kind not in ("mse", "kl", "cross_entropy"):
        raise ValueError(f"kind={kind!r} must be 'mse', 'kl' or 'cross_entropy'")
