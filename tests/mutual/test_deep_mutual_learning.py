"""Deep mutual learning: the term and the learner against float64 loops, masks, and equal numbers on every axis."""

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
K, N, D, C = 4, 8, 5, 3
BATCH = {
    "x": rng.normal(size=(N, D)).astype(np.float32),
    "y": np.array([0, 1, 2, 0, 1, 2, -1, -1], np.int32),
    "where": np.array([1, 1, 1, 1, 1, 1, 1, 0], bool),
}


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def kl_oracle(z, others, where, temperature):
    terms = []
    for n in range(len(z)):
        if where[n]:
            p = softmax(z[n] / temperature)
            qs = [softmax(o[n] / temperature) for o in others]
            terms.append(np.mean([sum(q * (np.log(q) - np.log(p))) for q in qs]) if qs else 0.0)
    return temperature**2 * np.mean(terms) if terms else 0.0


def test_mutual_kl_equals_the_loop():
    z = rng.normal(size=(K, N, C)) * 3
    where = BATCH["where"]
    for i, peers in ((0, [1, 2, 3]), (2, [0]), (1, [])):
        mask = np.isin(np.arange(K), peers)
        for temperature in (1.0, 3.0):
            run = jax.jit(mutual.mutual_kl, static_argnames="temperature")
            got = run(np.float32(z[i]), np.float32(z), peers=mask, temperature=temperature, where=where)
            np.testing.assert_allclose(got, kl_oracle(z[i], z[peers], where, temperature), rtol=2e-5, atol=1e-7)


def linear(features):
    """A network without hidden layer, so that its gradient can be written out."""
    return Layer(
        lambda key, d: {"w": jax.random.normal(key, (d, features))}, lambda params, x: x @ params["w"]
    )  # fmt: skip


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_one_step_of_sgd_equals_the_gradient_written_out(weight):
    learner = mutual.deep_mutual_learning(linear(C), optax.sgd(1.0), num_peers=K, weight=weight)
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    new, metrics = jax.jit(learner.update)(state, BATCH, jax.random.key(1))
    w = np.asarray(state.params["w"], np.float64)
    x, y, where = BATCH["x"].astype(np.float64), BATCH["y"], BATCH["where"]
    p = np.array([[softmax(row @ w[k]) for row in x] for k in range(K)])
    labelled = where & (y >= 0)
    for k in range(K):
        grad = np.zeros((D, C))
        for n in range(N):
            if labelled[n]:
                grad += np.outer(x[n], p[k, n] - np.eye(C)[y[n]]) / labelled.sum()
            if where[n]:
                # d KL(q || p) / d logits = p - q; the teachers' side is constant.
                pull = np.mean([p[k, n] - p[j, n] for j in range(K) if j != k], axis=0)
                grad += weight * np.outer(x[n], pull) / where.sum()
        np.testing.assert_allclose(new.params["w"][k], w[k] - grad, atol=3e-6)
        right = np.mean([p[k, n].argmax() == y[n] for n in range(N) if labelled[n]])
        np.testing.assert_allclose(metrics["accuracy"][k], right, atol=1e-6)
    votes = p.argmax(-1)
    agreement = np.mean([len(set(votes[:, n])) == 1 for n in range(N) if where[n]])
    np.testing.assert_allclose(metrics["agreement"], agreement, atol=1e-6)
    assert new.step == 1


def test_masked_examples_change_nothing_even_when_they_are_nan():
    learner = mutual.deep_mutual_learning(mlp([6, C]), optax.adam(1e-2), num_peers=2)
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    dirty = {**BATCH, "x": BATCH["x"].copy()}
    dirty["x"][7] = np.nan
    update = jax.jit(learner.update)
    a, b = update(state, BATCH, jax.random.key(1)), update(state, dirty, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    nothing = update(state, {**BATCH, "where": np.zeros(N, bool)}, jax.random.key(1))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))
    np.testing.assert_array_equal(nothing[1]["loss"], 0)


def test_one_peer_is_plain_training():
    learner = mutual.deep_mutual_learning(linear(C), optax.sgd(0.1), num_peers=1)
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    _, metrics = jax.jit(learner.update)(state, BATCH, jax.random.key(1))
    assert metrics["mutual_kl"].tolist() == [0.0]


def train(learner, steps, mapped, state):
    for i in range(steps):
        state, metrics = mapped(learner.update)(state, BATCH8, jax.random.key(i))
    return state, metrics


SHARED = {"agreement": P(), "ensemble_accuracy": P()}
BATCH8 = {
    "x": rng.normal(size=(16, D)).astype(np.float32),
    "y": rng.integers(0, C, 16).astype(np.int32),
    "where": np.arange(16) < 13,
}


@pytest.mark.parametrize("mode", ["peer vmap", "peer", "data", "peer and data", "peer and data unchecked"])
def test_training_is_equal_on_every_axis(mode):
    """Twenty steps of momentum SGD with 4 peers: one device, vmap over peers, and meshes."""
    net, tx = mlp([8, C]), optax.sgd(0.3, momentum=0.9)
    plain = mutual.deep_mutual_learning(net, tx, num_peers=K)
    start = jax.jit(plain.init)(jax.random.key(0), BATCH8)

    def loop(update):
        def run(state, batch):
            def body(i, carry):
                return update(carry[0], batch, jax.random.fold_in(jax.random.key(5), i))

            state, metrics = update(state, batch, jax.random.key(9))
            return jax.lax.fori_loop(0, 19, body, (state, metrics))

        return run

    expected, metrics = jax.jit(loop(plain.update))(start, BATCH8)
    if mode == "peer vmap":
        learner = mutual.deep_mutual_learning(net, tx, num_peers=K, axis_name="peer")
        split = jax.tree.map(lambda a: a if a.ndim == 0 else a.reshape(2, 2, *a.shape[1:]), start)
        axes = jax.tree.map(lambda a: None if a.ndim == 0 else 0, start)
        got, got_metrics = jax.jit(jax.vmap(loop(learner.update), in_axes=(axes, None), axis_name="peer"))(
            split, BATCH8
        )
        got = jax.tree.map(lambda a, b: a.reshape(b.shape) if b.ndim else a[0], got, expected)
        loss = got_metrics["loss"].reshape(-1)
    else:
        shape = {"peer": (2, 1), "data": (1, 4)}.get(mode, (2, 4))
        axis_types = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh(
            shape, ("peer", "data"), axis_types=axis_types, devices=jax.devices()[: shape[0] * shape[1]]
        )
        learner = mutual.deep_mutual_learning(net, tx, num_peers=K, axis_name="peer", data_axis_name="data")
        spec = jax.tree.map(lambda a: P("peer") if a.ndim else P(), start)
        out = (spec, {"loss": P("peer"), "accuracy": P("peer"), "mutual_kl": P("peer"), **SHARED})
        mapped = jax.shard_map(
            loop(learner.update),
            mesh=mesh,
            in_specs=(spec, P("data")),
            out_specs=out,
            check_vma="unchecked" not in mode,
        )
        got, got_metrics = jax.jit(mapped)(start, BATCH8)
        loss = got_metrics["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=2e-4)


def test_only_predictions_cross_the_peer_axis():
    """The compiled program gathers K x N x C logits, and no collective is as large as the parameters."""
    import re

    mesh = jax.make_mesh((4,), ("peer",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    learner = mutual.deep_mutual_learning(mlp([64, C]), optax.sgd(0.1), num_peers=4, axis_name="peer")
    plain = mutual.deep_mutual_learning(mlp([64, C]), optax.sgd(0.1), num_peers=4)
    start = jax.jit(plain.init)(jax.random.key(0), BATCH8)
    spec = jax.tree.map(lambda a: P("peer") if a.ndim else P(), start)
    out = (spec, {"loss": P("peer"), "accuracy": P("peer"), "mutual_kl": P("peer"), **SHARED})
    mapped = jax.shard_map(learner.update, mesh=mesh, in_specs=(spec, P(), P()), out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(start, BATCH8, jax.random.key(0)).compile().as_text()
    sizes = []
    for shape in re.findall(r"= f32\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text):
        sizes.append(int(np.prod([int(n) for n in shape.split(",") if n])))
    assert sizes and max(sizes) == 4 * 16 * C, sizes


def test_refuses():
    with pytest.raises(ValueError, match="num_peers=0"):
        mutual.deep_mutual_learning(linear(C), optax.sgd(0.1), num_peers=0)
    with pytest.raises(ValueError, match="temperature=0"):
        mutual.mutual_kl(jnp.zeros((2, 3)), jnp.zeros((1, 2, 3)), temperature=0.0)
    with pytest.raises(ValueError, match="peer_logits must be"):
        mutual.mutual_kl(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    learner = mutual.deep_mutual_learning(linear(C), optax.sgd(0.1), num_peers=3, axis_name="peer")
    with pytest.raises(ValueError, match="num_peers=3 must be divisible by the size 2"):
        jax.vmap(lambda k: learner.init(k, BATCH), in_axes=None, axis_size=2, axis_name="peer")(jax.random.key(0))


def loss_of_a_step(x, labels, *, where=None):
    """The mean loss of the peers at fixed parameters, as the learner reports it."""
    batch = {"x": x, "y": labels, "where": where}
    learner = mutual.deep_mutual_learning(linear(C), optax.sgd(0.1), num_peers=2)
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(2, D, C)), x.dtype)}
    _, metrics = learner.update(learner.init(jax.random.key(0), batch, params=params), batch, jax.random.key(1))
    return jnp.mean(metrics["loss"])


CASES = [
    Case(
        mutual.mutual_kl,
        {"logits": Arg("scores", (6, 4)), "peer_logits": Arg("scores", (3, 6, 4)), "where": Arg("where", (6,))},
        wrt=("logits",),
        frozen=("peer_logits",),
        rows={"logits": 0, "peer_logits": 1, "where": 0},
        symmetry="invariant",
    ),
    Case(
        loss_of_a_step,
        {"x": Arg("activations", (6, D)), "labels": Arg("labels", (6,), high=C), "where": Arg("where", (6,))},
        wrt=("x",),
        rows={"x": 0, "labels": 0, "where": 0},
        symmetry="invariant",
        covers=("mutual.deep_mutual_learning",),
        skip={"gradient": "the peers' predictions are constants, so the gradient is not the derivative"},
    ),
]
test_conformance = conformance.conformance_tests(CASES)
