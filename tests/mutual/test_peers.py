"""K networks in one program: equal numbers on every axis, what crosses it, and every way in which peers may differ."""

import re

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import mutual
from jaxlab.ops.layers import mlp
from jaxlab.types import Layer

rng = np.random.default_rng(0)
K, N, D, C = 4, 16, 5, 3
BATCH = {
    "x": rng.normal(size=(N, D)).astype(np.float32),
    "y": np.where(np.arange(N) % 5 == 4, -1, rng.integers(0, C, N)).astype(np.int32),
    "where": np.arange(N) < 13,
}
RATES = {"rate": np.float32([0.1, 0.2, 0.3, 0.4])}


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def featured(width=4):
    """A linear network with features between."""

    def init(key, size):
        keys = jax.random.split(key)
        return {"f": jax.random.normal(keys[0], (size, width)), "c": jax.random.normal(keys[1], (width, C))}

    def apply(params, x):
        features = jnp.tanh(x @ params["f"])
        return {"logits": features @ params["c"], "features": features}

    return Layer(init, apply)


def view(key, x):
    """An augmentation that is the same for a part of the batch as for all of it."""
    return x * (1 + 0.1 * jax.random.normal(key, (1, D)))


def everything(**axes):
    """Peers with hyper-parameters, views, warm-up, a symmetric term and features."""
    objective = mutual.mutual_objective(
        direction="symmetric", temperature=2.0, features="features", axis_name=axes.get("data_axis_name")
    )
    return mutual.peers(
        featured(),
        lambda hyper: optax.sgd(hyper["rate"], momentum=0.9),
        num_peers=K,
        hyper=RATES,
        mutual=objective,
        exchanged=("logits", "features"),
        weight=lambda step: mutual.ramp_up(step, length=5),
        augment=view,
        **axes,
    )


def twenty(update):
    """Returns the state after one step, and state and metrics after twenty."""

    def run(state, batch):
        first, metrics = update(state, batch, jax.random.key(9))
        body = lambda i, carry: update(carry[0], batch, jax.random.fold_in(jax.random.key(5), i))
        return first, *jax.lax.fori_loop(0, 19, body, (first, metrics))

    return run


PLAIN = everything()
START = jax.jit(PLAIN.init)(jax.random.key(0), BATCH)
METRICS = {"loss": P("peer"), "mutual": P("peer"), "accuracy": P("peer"), "agreement": P(), "ensemble_accuracy": P()}


@pytest.fixture(scope="module")
def expected():
    return jax.jit(twenty(PLAIN.update))(START, BATCH)


def mapped(mode):
    """Returns first state, last state and metrics as one device would hold them."""
    by_peer = jax.tree.map(lambda a: P("peer") if a.ndim else P(), START)
    if mode in ("vmap", "pmap"):
        shards = 2 if mode == "vmap" else 4
        run = twenty(everything(axis_name="peer").update)
        split = jax.tree.map(lambda a: a.reshape(shards, -1, *a.shape[1:]) if a.ndim else a, START)
        axes = jax.tree.map(lambda a: 0 if a.ndim else None, START)
        if mode == "vmap":
            got = jax.jit(jax.vmap(run, in_axes=(axes, None), axis_name="peer"))(split, BATCH)
            last = lambda a, like: a.reshape(like.shape) if like.ndim else a[0]
        else:
            each = {name: None if spec == P() else 0 for name, spec in METRICS.items()}
            devices = jax.devices()[:shards]
            got = jax.pmap(run, in_axes=(axes, None), out_axes=(axes, axes, each), axis_name="peer", devices=devices)(
                split, BATCH
            )
            last = lambda a, like: np.reshape(a, like.shape)
        shapes = jax.eval_shape(twenty(PLAIN.update), START, BATCH)
        return jax.tree.map(last, jax.tree.map(np.asarray, got), shapes)
    names, shape = ("peer",), (2,)
    if mode != "peer":
        names, shape = ("peer", "data", "expert", "model"), (2, 2, 2, 1)
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(shape, names, axis_types=kinds, devices=jax.devices()[: int(np.prod(shape))])
    axes = {"axis_name": "peer"} if mode == "peer" else {"axis_name": "peer", "data_axis_name": "data"}
    run = jax.shard_map(
        twenty(everything(**axes).update),
        mesh=mesh,
        in_specs=(by_peer, P() if mode == "peer" else P("data")),
        out_specs=(by_peer, by_peer, METRICS),
        check_vma="unchecked" not in mode,
    )
    return jax.jit(run)(START, BATCH)


@pytest.mark.parametrize("mode", ["vmap", "pmap", "peer", "peer and others", "peer and others unchecked"])
def test_values_gradients_and_twenty_steps_are_equal_on_every_axis(mode, expected):
    """The first step's update is the gradient times each peer's rate; two peers a shard but for pmap's one."""
    first, last, metrics = mapped(mode)
    for got, want in ((first, expected[0]), (last, expected[1]), (metrics, expected[2])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=3e-5), got, want)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.params, START.params)
    assert min(jax.tree.leaves(moved)) > 1e-4 and last.step == 20


def test_rates_views_and_losses_are_each_peers_own():
    """One step of plain SGD against the gradient written out, for two peers with rates of their own."""
    net = Layer(lambda key, d: {"w": jax.random.normal(key, (d, C))}, lambda params, x: x @ params["w"])
    learner = mutual.peers(
        net,
        lambda h: optax.sgd(h),
        num_peers=2,
        hyper=np.float32([0.5, 2.0]),
        mutual=mutual.mutual_objective(direction="reverse"),
        weight=0.7,
    )
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    new, metrics = jax.jit(learner.update)(state, BATCH, jax.random.key(1))
    x, y, where = BATCH["x"].astype(np.float64), BATCH["y"], BATCH["where"]
    w = np.asarray(state.params["w"], np.float64)
    p = softmax(np.einsum("nd,kdc->knc", x, w))
    labelled = where & (y >= 0)
    for k, rate in enumerate((0.5, 2.0)):
        grad, q = np.zeros((D, C)), p[1 - k]
        for n in np.flatnonzero(where):
            if labelled[n]:
                grad += np.outer(x[n], p[k, n] - np.eye(C)[y[n]]) / labelled.sum()
            log = np.log(p[k, n] / q[n])
            grad += 0.7 * np.outer(x[n], p[k, n] * (log - np.sum(p[k, n] * log))) / where.sum()
        np.testing.assert_allclose(new.params["w"][k], w[k] - rate * grad, rtol=1e-4, atol=1e-5)
        reverse = np.mean([np.sum(p[k, n] * np.log(p[k, n] / q[n])) for n in np.flatnonzero(where)])
        np.testing.assert_allclose(metrics["mutual"][k], reverse, rtol=1e-4)


def test_the_mutual_term_equals_the_loop_in_every_direction():
    z, others = rng.normal(size=(N, C)), rng.normal(size=(3, N, C))
    f, said = rng.normal(size=(N, 4)), rng.normal(size=(3, N, 4))
    where, teach, T = BATCH["where"], np.array([True, False, True]), 2.0
    dirty = lambda a: np.float32(np.where(where[:, None], a, np.nan))
    outputs = {"logits": dirty(z), "features": dirty(f)}
    everyone = {"logits": np.stack([dirty(a) for a in others]), "features": np.stack([dirty(a) for a in said])}

    @jax.jit
    def run(outputs, everyone):
        def one(features, direction):
            options = {"direction": direction, "temperature": T, "features": features, "feature_weight": 0.3}
            return mutual.mutual_objective(**options)(outputs, everyone, jnp.asarray(teach), {"where": where})

        return [one(None, d) for d in ("one_way", "reverse", "symmetric")], one("features", "one_way")

    got, with_features = run(outputs, everyone)
    p, kl = softmax(z / T), lambda a, b: np.sum(a * np.log(a / b))
    forward = backward = apart = 0.0
    unit = lambda a: a / np.linalg.norm(a)
    for n in np.flatnonzero(where):
        for k in (0, 2):
            q = softmax(others[k, n] / T)
            forward += T**2 * kl(q, p[n]) / 2 / where.sum()
            backward += T**2 * kl(p[n], q) / 2 / where.sum()
            apart += np.sum((unit(f[n]) - unit(said[k, n])) ** 2) / 2 / where.sum()
    np.testing.assert_allclose(got, [forward, backward, (forward + backward) / 2], rtol=1e-4)
    np.testing.assert_allclose(with_features, forward + 0.3 * apart, rtol=1e-4)


def test_different_networks_train_by_the_same_losses():
    """A list of two like networks gives the numbers of the mapped form; then widths differ."""
    options = {"mutual": mutual.mutual_objective(), "exchanged": ("logits", "features")}
    whole = mutual.peers(featured(), optax.adam(0.1), num_peers=2, **options)
    unrolled = mutual.peers([featured(), featured()], optax.adam(0.1), **options)

    @jax.jit
    def run(key):
        a = whole.init(key, BATCH)
        rows = [jax.tree.map(lambda leaf, i=i: leaf[i], a.params) for i in range(2)]
        b = unrolled.init(key, BATCH, params=rows)
        for i in range(3):
            (a, m), (b, n) = (f.update(s, BATCH, jax.random.key(i)) for f, s in ((whole, a), (unrolled, b)))
        return a.params, b.params, m, n, whole.predict(a, BATCH)["probs"], unrolled.predict(b, BATCH)["probs"]

    a, b, m, n, probs, others = run(jax.random.key(0))
    jax.tree.map(lambda x, *rows: np.testing.assert_allclose(x, rows, rtol=1e-4, atol=1e-5), a, *b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), m, n)
    np.testing.assert_allclose(probs, others, rtol=1e-4, atol=1e-6)
    mixed = mutual.peers([mlp([7, C]), mlp([C])], optax.sgd(0.1), mutual=mutual.mutual_objective())
    state = jax.jit(mixed.init)(jax.random.key(0), BATCH)
    _, metrics = jax.jit(mixed.update)(state, BATCH, jax.random.key(1))
    z = [np.asarray(o["logits"], np.float64) for o in jax.jit(mixed.predict)(state, BATCH)["peers"]]
    p, real = [softmax(a) for a in z], BATCH["where"]
    for k in range(2):
        kl = np.mean(np.sum(p[1 - k] * np.log(p[1 - k] / p[k]), axis=-1)[real])
        np.testing.assert_allclose(metrics["mutual"][k], kl, rtol=1e-4)
    agreement = np.mean((p[0].argmax(-1) == p[1].argmax(-1))[real])
    np.testing.assert_allclose(metrics["agreement"], agreement, rtol=1e-6)
    labelled = real & (BATCH["y"] >= 0)
    together = np.mean(((p[0] + p[1]).argmax(-1) == BATCH["y"])[labelled])
    np.testing.assert_allclose(metrics["ensemble_accuracy"], together, rtol=1e-6)


def test_peers_leave_and_join_between_steps():
    """Without the third peer, the first two are as if there were two; it stands still, and comes back."""
    options = {"mutual": mutual.mutual_objective()}
    three = mutual.peers(mlp([C]), optax.adam(0.1), num_peers=3, **options)
    two = mutual.peers(mlp([C]), optax.adam(0.1), num_peers=2, **options)
    state = jax.jit(three.init)(jax.random.key(0), BATCH)
    pair = jax.tree.map(lambda a: a[:2] if a.ndim else a, state)
    update, update_two = jax.jit(three.update), jax.jit(two.update)
    away = {**BATCH, "peers": np.array([True, True, False])}
    new, metrics = update(state, away, jax.random.key(1))
    pair, two_metrics = update_two(pair, BATCH, jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:2] if a.ndim else a, b, rtol=1e-5, atol=1e-6), new, pair)
    np.testing.assert_allclose(metrics["loss"][:2], two_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["agreement"], two_metrics["agreement"], rtol=1e-6)
    still = lambda tree: jax.tree.map(lambda a: a[2], (tree.params, tree.opt_state))
    jax.tree.map(np.testing.assert_array_equal, still(new), still(state))
    back, _ = update(new, {**BATCH, "peers": np.ones(3, bool)}, jax.random.key(2))
    assert not np.array_equal(back.params["dense_0"]["w"][2], new.params["dense_0"]["w"][2])


def test_each_peer_may_have_its_own_order_of_the_data():
    learner = mutual.peers(mlp([C]), optax.sgd(0.1), num_peers=2, mutual=mutual.mutual_objective())
    own = {"x": rng.normal(size=(2, 6, D)).astype(np.float32), "y": rng.integers(0, C, (2, 6)).astype(np.int32)}
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    _, metrics = jax.jit(learner.update)(state, {**BATCH, "own": own}, jax.random.key(1))
    w, b = (np.asarray(state.params["dense_0"][n], np.float64) for n in "wb")
    shared = [softmax(BATCH["x"] @ w[k] + b[k]) for k in range(2)]
    for k in range(2):
        p = softmax(own["x"][k] @ w[k] + b[k])
        kl = np.sum(shared[1 - k] * np.log(shared[1 - k] / shared[k]), axis=-1)[BATCH["where"]].mean()
        ce = -np.mean(np.log(p[np.arange(6), own["y"][k]]))
        np.testing.assert_allclose(metrics["mutual"][k], kl, rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"][k], ce + kl, rtol=1e-4)
        np.testing.assert_allclose(metrics["accuracy"][k], np.mean(p.argmax(-1) == own["y"][k]), atol=1e-6)


BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def collectives(text):
    """Returns kind and bytes of every collective of a compiled program."""
    found = []
    for line in text.splitlines():
        call = re.search(
            r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line
        )
        if call:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", call.group(1))
            sizes = [BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes]
            found.append((call.group(2), sum(sizes)))
    return sorted(found)


@pytest.mark.optimised
@pytest.mark.parametrize("features", [False, True])
def test_only_predictions_cross_the_peer_axis(features):
    """Four wide peers on four devices: a gather of K N C logits (and of K N F features), and two metrics."""
    width = 64
    learner = mutual.peers(
        featured(width),
        optax.adam(0.1),
        num_peers=4,
        mutual=mutual.mutual_objective(features="features" if features else None),
        exchanged=("logits", "features") if features else ("logits",),
        axis_name="peer",
    )
    mesh = jax.make_mesh((4,), ("peer",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    whole = mutual.peers(featured(width), optax.adam(0.1), num_peers=4)
    start = jax.eval_shape(whole.init, jax.random.key(0), BATCH)
    spec = jax.tree.map(lambda a: P("peer") if a.ndim else P(), start)
    run = jax.shard_map(
        learner.update, mesh=mesh, in_specs=(spec, P(), P()), out_specs=(spec, METRICS), check_vma=False
    )
    text = jax.jit(run).lower(start, BATCH, jax.random.key(0)).compile().as_text()
    gathered = 4 * 4 * N * (C + (width if features else 0))
    found = collectives(text)
    assert sum(size for kind, size in found if kind == "all-gather") == gathered, found
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}, found
    assert sum(size for kind, size in found if kind == "all-reduce") == 8, found


def test_refuses():
    with pytest.raises(ValueError, match="num_peers=0"):
        mutual.peers(mlp([C]), optax.sgd(0.1), num_peers=0)
    with pytest.raises(ValueError, match="must be the number of networks, 2"):
        mutual.peers([mlp([C]), mlp([C])], optax.sgd(0.1), num_peers=3)
    with pytest.raises(ValueError, match="different networks are different programs"):
        mutual.peers([mlp([C]), mlp([C])], optax.sgd(0.1), axis_name="peer")
    with pytest.raises(ValueError, match="direction='both'"):
        mutual.mutual_objective(direction="both")
    with pytest.raises(ValueError, match="temperature=0"):
        mutual.mutual_objective(temperature=0)


def objective_case(logits, features, everyone, all_features, where, axis_name=None):
    objective = mutual.mutual_objective(direction="symmetric", features="features", axis_name=axis_name)
    outputs = {"logits": logits, "features": features}
    others = {"logits": everyone, "features": all_features}
    return objective(outputs, others, jnp.array([True, False]), {"where": where})


W = np.float32(rng.normal(size=(2, D, C)))


@jax.jit
def one_step(x, y, where):
    net = Layer(None, lambda params, x: x @ params["w"])
    learner = mutual.peers(net, optax.sgd(0.1), num_peers=2, mutual=mutual.mutual_objective())
    batch = {"x": x, "y": y, "where": where}
    state = learner.init(jax.random.key(0), batch, params={"w": jnp.asarray(W, x.dtype)})
    return jnp.mean(learner.update(state, batch, jax.random.key(1))[1]["loss"])


CASES = [
    Case(
        objective_case,
        {
            "logits": Arg("scores", (6, 3)),
            "features": Arg("embeddings", (6, 4)),
            "everyone": Arg("scores", (2, 6, 3)),
            "all_features": Arg("embeddings", (2, 6, 4)),
            "where": Arg("where", (6,)),
        },
        wrt=("logits", "features"),
        frozen=("everyone", "all_features"),
        rows={"logits": 0, "features": 0, "everyone": 1, "all_features": 1, "where": 0},
        symmetry="invariant",
        name="mutual_objective",
        covers=("mutual.mutual_objective",),
    ),
    Case(
        one_step,
        {"x": Arg("embeddings", (6, D)), "y": Arg("labels", (6,)), "where": Arg("where", (6,))},
        reason="the peers' predictions are constants; the gradient written out is the test",
        rows={"x": 0, "y": 0, "where": 0},
        helper=True,
        name="peers",
        covers=("mutual.peers",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)
