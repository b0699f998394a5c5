"""K networks in one program: a learner for any loss, where each peer lives, its keys, and what its outputs are.

Every leaf of a learner's state has a leading axis of LOCAL peers: all K without an axis name, K / axis size of them on
each shard of a mapped axis. Only predictions, or the features that an objective names, cross the axis; weights never
do. The same update function runs under `vmap(axis_name=...)`, `pmap(axis_name=...)` and `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.ops.collectives import all_mean, axis_index, axis_size, gather_rows, global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.types import Layer, Learner, LearnerState, PyTree, StatefulLayer, as_stateful

Network = Layer | StatefulLayer | Callable[..., Any]


def peers(
    net: Network | Sequence[Network],
    optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
    *,
    num_peers: int | None = None,
    loss: Callable[..., tuple[Array, dict[str, Array]]] | None = None,
    mutual: Callable[..., Array] | None = None,
    exchanged: Sequence[str] = ("logits",),
    weight: float | Callable[[Array], Array] = 1.0,
    hyper: PyTree = None,
    augment: Callable[[Array, Array], Array] | None = None,
    axis_name: str | None = None,
    data_axis_name: str | None = None,
) -> Learner:
    """Returns a learner that trains K networks, each on a loss of its own and on what the others say.

    `L_k = loss(outputs_k) + weight * mutual(outputs_k, what all exchanged)`; each peer's parameters occur in its own
    loss alone. Networks that are taught by averages of networks are `mean_teacher`.

    Args:
        net: network whose `apply` gives logits `[N, C]`, or a dict with `logits`, whatever the objectives read, and
            optionally a scalar `penalty` that is added to its peer's loss. A list of different networks makes peers of
            different architecture: their program is unrolled, and they cannot be spread over an axis.
        optimizer: applied to each peer on its own; with `hyper`, a function from one peer's entries to one.
        num_peers: K >= 1; by default 2, or the length of the list.
        loss: `loss(outputs, batch)` of one peer gives a scalar and a dict of scalars; None = cross entropy, accuracy.
        mutual: `mutual(outputs, everyone, teach, batch)` of one peer gives a scalar. `everyone` holds what all K peers
            exchanged (leading axis K, constant), bool `teach [K]` who of them teaches this one. See `mutual_objective`.
        exchanged: entries of the outputs that cross the axis; nothing else does.
        weight: of the mutual term, a float or a function of the step (warm-up, see `ramp_up`).
        hyper: pytree with leaves [K], hyper-parameters of each peer, one program for all.
        augment: `augment(key, x)`; each peer draws its own view.
        axis_name: mapped axis over which the peers are spread, K / axis size of them on each shard; None = all here.
        data_axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `LearnerState`. `init(key, batch, params=None, net_state=None)`; every leaf of the state but
        `step` has a leading axis of local peers (with different networks it holds lists of K). `batch`: `x [N, ...]`,
        `y int [N]` (-1 = unlabelled), optional `where [N]`; optional `peers`, bool [K], who takes part in this step:
        the others neither learn nor teach; optional `own`, a dict of the same with a leading axis of local peers, on
        which each peer's own loss is then taken instead (its own order of the data). Objectives also find `step` and
        one peer's `hyper` in their batch. Metrics: `loss`, `mutual` and the loss's, each [local peers], and the scalars
        `agreement`, the share of examples for which all take the same class, and `ensemble_accuracy`, how often their
        mean prediction is right. `predict` gives every peer's outputs
        [local peers, N, ...] and `probs [N, C]`, the mean over all peers (a list of K dicts under `peers` and `probs`
        for different networks).

    Raises:
        ValueError: `num_peers` is below 1, does not fit the list or is not divisible by the axis size; different
            networks are to be spread over an axis.

    Example:
        >>> from jaxlab.mutual import mutual_objective
        >>> from jaxlab.ops.layers import mlp
        >>> options = {"num_peers": 3, "hyper": {"rate": jnp.array([0.1, 0.2, 0.3])}, "mutual": mutual_objective()}
        >>> learner = peers(mlp([3]), lambda hyper: optax.sgd(hyper["rate"]), **options)
        >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.array([0, 1, 2, 0]), "peers": jnp.array([True, True, False])}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> jax.jit(learner.update)(state, batch, jax.random.key(1))[1]["mutual"].shape
        (3,)

    Source:
        The common frame of Zhang et al., Deep Mutual Learning, arXiv 1706.00384, and what followed it.
    """
    alike = not isinstance(net, list | tuple) or isinstance(net, Layer | StatefulLayer)
    nets = [as_stateful(n) for n in ([net] if alike else net)]
    num_peers = (2 if alike else len(nets)) if num_peers is None else num_peers
    if num_peers < 1:
        raise ValueError(f"num_peers={num_peers} must be at least 1")
    if not alike and num_peers != len(nets):
        raise ValueError(f"num_peers={num_peers} must be the number of networks, {len(nets)}")
    if not alike and axis_name is not None:
        raise ValueError(f"axis_name={axis_name!r}: different networks are different programs, which share no axis")
    criterion = _supervised(data_axis_name) if loss is None else loss

    def each(function, *args):
        """Calls `function(net, *one peer's args)` for all local peers: as one program, or unrolled."""
        if alike:
            return jax.vmap(lambda *one: function(nets[0], *one))(*args)
        rows = [a if isinstance(a, list) else [_row(a, i) for i in range(num_peers)] for a in args]
        return [function(*one) for one in zip(nets, *rows, strict=True)]

    def stacked(results):
        return results if alike else jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    def rule(one):
        return optimizer if hyper is None else optimizer(one)

    def init(key, batch, *, params=None, net_state=None):
        ids = peer_ids(num_peers, axis_name=axis_name)
        if params is None:
            dims = example_dims(batch["x"])
            made = each(lambda net, k: net.init(k, dims), peer_keys(key, ids))
            params, net_state = made if alike else ([pair[i] for pair in made] for i in range(2))
        elif net_state is None:
            net_state = {} if alike else [{} for _ in nets]
        opt_state = each(lambda net, p, h: rule(h).init(p), params, _local(hyper, ids))
        return LearnerState(params, net_state, opt_state, jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        ids = peer_ids(num_peers, axis_name=axis_name)
        here = _local(hyper, ids)
        active = batch.get("peers")
        present = jnp.ones(num_peers, bool) if active is None else active
        shared, own = _real(batch), batch.get("own")
        own = None if own is None else jax.vmap(_real)(own)
        keys = peer_keys(key, ids)

        def forward(net, params, net_state, x, key):
            if augment is not None:
                key, key_view = jax.random.split(key)
                x = augment(key_view, x)
            outputs, net_state = net.apply(params, net_state, x, key=key, train=True)
            return as_outputs(outputs), net_state

        def total(params):
            run = lambda net, p, s, k: forward(net, p, s, shared["x"], k)
            results, mine = each(run, params, state.net_state, keys), None
            outputs, net_state = results if alike else ([r[i] for r in results] for i in range(2))
            if own is not None:
                apart = lambda net, p, s, x, k: forward(net, p, s, x, jax.random.fold_in(k, 1))
                results = each(apart, params, net_state, own["x"], keys)
                mine, net_state = results if alike else ([r[i] for r in results] for i in range(2))
            said = outputs if alike else stacked([{n: o[n] for n in ("logits", *exchanged)} for o in outputs])
            told = {n: gather_rows(jax.lax.stop_gradient(said[n]), axis_name) for n in {"logits", *exchanged}}
            everyone = {n: told[n] for n in exchanged}

            def of_peer(net, outputs, mine, own, i, h):
                del net
                extra = {"step": state.step, "hyper": h}
                known, labelled = (outputs, shared) if mine is None else (mine, own)
                value, metrics = criterion(known, {**labelled, **extra})
                if "penalty" in known:
                    value = value + all_mean(known["penalty"], data_axis_name)
                if mutual is None:
                    return value, {"loss": value, "mutual": jnp.zeros_like(value), **metrics}
                teach = (jnp.arange(num_peers) != i) & present
                term = mutual(outputs, everyone, teach, {**shared, **extra})
                value = value + (weight(state.step) if callable(weight) else weight) * term
                return value, {"loss": value, "mutual": term, **metrics}

            losses, metrics = _pair(each(of_peer, outputs, mine, own, ids, here), alike)
            votes = jnp.argmax(told["logits"], axis=-1)
            first = jnp.take(votes, jnp.argmax(present), axis=0)
            same = jnp.all((votes == first[None]) | jnp.logical_not(present)[:, None], axis=0)
            agreement = global_mean(same.astype(jnp.float32), shared["where"], axis_name=data_axis_name)
            probs = jax.nn.softmax(told["logits"].astype(jnp.float32)) * present.astype(jnp.float32)[:, None, None]
            right = (jnp.argmax(jnp.sum(probs, axis=0), axis=-1) == shared["y"]).astype(jnp.float32)
            labelled = shared["where"] & (shared["y"] >= 0)
            together = global_mean(right, labelled, axis_name=data_axis_name)
            # Equal on all shards of peers already; the mean says so to shard_map.
            joint = {"agreement": agreement, "ensemble_accuracy": together}
            metrics = {**stacked(metrics), **all_mean(joint, axis_name)}
            return jnp.sum(stacked(losses)), (metrics, net_state)

        run = value_and_grad(total, axis_name=data_axis_name, has_aux=True)
        (_, (metrics, net_state)), grads = run(state.params)

        def step(net, grads, opt_state, params, h):
            updates, opt_state = rule(h).update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = _pair(each(step, grads, state.opt_state, state.params, here), alike)
        new = LearnerState(params, net_state, opt_state, state.step + 1)
        if active is not None:
            taking = present[ids]
            keep = lambda net, on, new, old: jax.tree.map(lambda a, b: jnp.where(on, a, b), new, old)
            merge = lambda a, b: each(keep, taking, a, b)
            new = LearnerState(
                merge(params, state.params),
                merge(net_state, state.net_state),
                merge(opt_state, state.opt_state),
                new.step,
            )
        return new, metrics

    def predict(state, batch):
        ask = lambda net, p, s: as_outputs(net.apply(p, s, batch["x"], train=False)[0])
        outputs = each(ask, state.params, state.net_state)
        if alike:
            return {**outputs, "probs": ensemble_probs(outputs["logits"], axis_name=axis_name)}
        return {"peers": outputs, "probs": ensemble_probs(jnp.stack([o["logits"] for o in outputs]))}

    return Learner(init, update, predict)


def peer_ids(num_peers: int, *, axis_name: str | None = None) -> Array:
    """Returns the numbers of the peers that live here.

    Args:
        num_peers: K, over all shards.
        axis_name: mapped axis over which the peers are spread; None = all here.

    Returns:
        int32 [K / axis size].

    Raises:
        ValueError: `num_peers` is below 1 or not divisible by the axis size.

    Example:
        >>> peer_ids(3).tolist()
        [0, 1, 2]
        >>> jax.vmap(lambda _: peer_ids(4, axis_name="peer"), axis_name="peer")(jnp.zeros(2)).tolist()
        [[0, 1], [2, 3]]
    """
    if num_peers < 1:
        raise ValueError(f"num_peers={num_peers} must be at least 1")
    shards = axis_size(axis_name)
    if num_peers % shards:
        raise ValueError(f"num_peers={num_peers} must be divisible by the size {shards} of axis {axis_name!r}")
    local = num_peers // shards
    return axis_index(axis_name) * local + jnp.arange(local)


def peer_keys(key: Array, ids: Array) -> Array:
    """Returns a key of its own for each peer, the same wherever the peer lives.

    Args:
        key: typed key of the step.
        ids: int [local peers], see `peer_ids`.

    Returns:
        Typed keys [local peers].

    Example:
        >>> keys = peer_keys(jax.random.key(0), jnp.array([1, 2]))
        >>> bool(keys[0] == jax.random.fold_in(jax.random.key(0), 1))
        True
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def example_dims(x: Array) -> Any:
    """Returns what a network's `init` wants for a batch: the number of features, or the shape of one example.

    Args:
        x: [N, ...].

    Example:
        >>> example_dims(jnp.ones((4, 2))), example_dims(jnp.ones((4, 8, 8, 1))).shape
        (2, (8, 8, 1))
    """
    return x.shape[1] if x.ndim == 2 else jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def as_outputs(outputs: Array | dict[str, Any]) -> dict[str, Any]:
    """Returns a network's outputs as a dict; an array is its `logits`.

    Args:
        outputs: what a network's `apply` gives.

    Example:
        >>> list(as_outputs(jnp.ones((4, 3))))
        ['logits']
    """
    return outputs if isinstance(outputs, dict) else {"logits": outputs}


def ensemble_probs(logits: Array, *, axis_name: str | None = None) -> Array:
    """Returns the mean over all peers of their predictions.

    Args:
        logits: float [local peers, N, C].
        axis_name: mapped axis over which the peers are spread.

    Returns:
        float32 [N, C].

    Example:
        >>> ensemble_probs(jnp.array([[[0.0, 0.0]], [[100.0, 0.0]]])).tolist()
        [[0.75, 0.25]]
    """
    return jnp.mean(jax.nn.softmax(gather_rows(logits, axis_name).astype(jnp.float32)), axis=0)


def _supervised(axis_name):
    """Returns the cross entropy of the labelled examples, with the accuracy among them."""

    def loss(outputs, batch):
        where, y = batch["where"], batch["y"]
        z = zero_where_false(outputs["logits"], where)
        z = z.astype(compute_dtype(z))
        terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
        labelled = where & (y >= 0)
        right = (jnp.argmax(z, -1) == y).astype(jnp.float32)
        mean = lambda terms: global_mean(terms, labelled, axis_name=axis_name)
        return mean(terms), {"accuracy": mean(right)}

    return loss


def _real(batch):
    """Returns the batch's data with a mask, and zeros under it."""
    where = batch.get("where")
    where = jnp.ones(batch["y"].shape, bool) if where is None else where
    rest = {n: v for n, v in batch.items() if n not in ("own", "peers")}
    return {**rest, "x": zero_where_false(batch["x"], where), "where": where}


def _local(hyper, ids):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[ids], hyper)


def _row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _pair(results, alike):
    return results if alike else ([r[0] for r in results], [r[1] for r in results])
