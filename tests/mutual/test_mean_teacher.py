"""Mean teachers: the losses and one step against float64 loops, the average, masks, and equal numbers on a mesh."""

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
from jaxlab.types import Layer, StatefulLayer

rng = np.random.default_rng(0)
N, D, C = 16, 5, 3
BATCH = {
    "x": rng.normal(size=(N, D)).astype(np.float32),
    "y": np.where(np.arange(N) % 3 == 2, -1, rng.integers(0, C, N)).astype(np.int32),
    "where": np.arange(N) < 13,
}


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize("kind", ["mse", "kl", "cross_entropy"])
def test_consistency_equals_the_loop(kind):
    z, t, where = rng.normal(size=(6, C)) * 3, rng.normal(size=(6, C)) * 3, np.arange(6) != 2
    for temperature in (1.0, 2.5):
        terms = np.zeros(6)
        for n in range(6):
            p, q = softmax(z[n] / temperature), softmax(t[n] / temperature)
            terms[n] = (
                where[n]
                * {
                    "mse": np.mean((p - q) ** 2),
                    "kl": temperature**2 * np.sum(q * np.log(q / p)),
                    "cross_entropy": -(temperature**2) * np.sum(q * np.log(p)),
                }[kind]
            )
        options = {"kind": kind, "temperature": temperature, "where": where}
        got = mutual.consistency_loss(jnp.float32(z), jnp.float32(t), reduction="none", **options)
        np.testing.assert_allclose(got, terms, rtol=2e-5, atol=1e-7)
        got = mutual.consistency_loss(jnp.float32(z), jnp.float32(t), **options)
        np.testing.assert_allclose(got, terms.sum() / 5, rtol=2e-5)


def linear():
    return Layer(lambda key, d: {"w": jax.random.normal(key, (d, C))}, lambda params, x: x @ params["w"])


@pytest.mark.parametrize("peers", [1, 3])
def test_two_steps_equal_the_gradient_written_out(peers):
    """Teachers: the own average for one network, the averages of the others for three; then the averages themselves."""
    learner = mutual.mean_teacher(linear(), optax.sgd(0.5), num_peers=peers, weight=0.7, kind="kl", decay=0.4)
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    update = jax.jit(learner.update)
    x, y, where = BATCH["x"].astype(np.float64), BATCH["y"], BATCH["where"]
    labelled = where & (y >= 0)
    w = np.asarray(state.params["w"], np.float64)
    # Start the averages elsewhere, so that the first step already has something to learn from.
    start = w + rng.normal(size=w.shape)
    state = state.__class__(**{**vars(state), "teacher_params": {"w": jnp.float32(start)}})
    teacher = start
    for t in range(2):
        p = np.array([[softmax(row @ w[k]) for row in x] for k in range(peers)])
        q = np.array([[softmax(row @ teacher[k]) for row in x] for k in range(peers)])
        new, losses = w.copy(), np.zeros(peers)
        for k in range(peers):
            sources = [j for j in range(peers) if j != k] or [0]
            grad = np.zeros((D, C))
            for n in np.flatnonzero(where):
                target = np.mean([q[j, n] for j in sources], axis=0)
                grad += 0.7 * np.outer(x[n], p[k, n] - target) / where.sum()
                divergence = np.mean([np.sum(q[j, n] * np.log(q[j, n] / p[k, n])) for j in sources])
                losses[k] += 0.7 * divergence / where.sum()
                if labelled[n]:
                    grad += np.outer(x[n], p[k, n] - np.eye(C)[y[n]]) / labelled.sum()
                    losses[k] -= np.log(p[k, n, y[n]]) / labelled.sum()
            new[k] = w[k] - 0.5 * grad
        w = new
        decay = min(1 - 1 / (t + 1), 0.4)
        teacher = decay * teacher + (1 - decay) * w
        state, metrics = update(state, BATCH, jax.random.key(t))
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
        np.testing.assert_allclose(state.params["w"], w, atol=5e-6)
        np.testing.assert_allclose(state.teacher_params["w"], teacher, atol=5e-6)
    probs = np.mean([[softmax(row @ teacher[k]) for row in x] for k in range(peers)], axis=0)
    np.testing.assert_allclose(learner.predict(state, BATCH)["probs"], probs, atol=1e-5)
    assert state.step == 2


def test_views_keys_and_memory():
    """One network and its average see two views; a peer and its average see one; both use and keep their own state."""
    seen = {}

    def apply(params, state, x, *, key, train):
        return {"logits": x @ params["w"], "seen": x}, {"sum": state["sum"] + jnp.sum(x)}

    net = StatefulLayer(lambda key, d: ({"w": jnp.ones((d, C))}, {"sum": jnp.zeros(())}), apply)

    def objective(outputs, teachers, batch, teach, step):
        seen["teachers"] = teachers["seen"].shape
        return jnp.sum(outputs["logits"]) * 0.0, {"own": outputs["seen"][0, 0], "average": teachers["seen"][:, 0, 0]}

    for peers in (1, 2):
        augment = lambda key, x: x + jax.random.normal(key, (1, 1))
        learner = mutual.mean_teacher(net, optax.sgd(0.1), num_peers=peers, objective=objective, augment=augment)
        batch = {"x": jnp.zeros((4, 2)), "y": jnp.zeros(4, jnp.int32)}
        state, metrics = jax.jit(learner.update)(learner.init(jax.random.key(0), batch), batch, jax.random.key(1))
        assert seen["teachers"] == (peers, 4, 2)
        same = np.isclose(metrics["own"], metrics["average"][0])
        assert np.all(same) == (peers > 1)
        np.testing.assert_allclose(state.net_state["sum"], 8 * metrics["own"], rtol=1e-5)
        np.testing.assert_allclose(state.teacher_state["sum"], 8 * metrics["average"][0], rtol=1e-5)


def test_a_new_state_can_be_donated():
    """Network and average start equal, but in buffers of their own."""
    learner = mutual.mean_teacher(linear(), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), BATCH)
    assert state.params["w"].unsafe_buffer_pointer() != state.teacher_params["w"].unsafe_buffer_pointer()
    state, _ = jax.jit(learner.update, donate_argnums=0)(state, BATCH, jax.random.key(1))
    assert np.all(np.isfinite(state.teacher_params["w"]))


def test_masked_examples_change_nothing_even_when_they_are_nan():
    learner = mutual.mean_teacher(mlp([6, C]), optax.adam(1e-2), num_peers=2)
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    dirty = {**BATCH, "x": np.where(BATCH["where"][:, None], BATCH["x"], np.nan)}
    update = jax.jit(learner.update)
    a, b = update(state, BATCH, jax.random.key(1)), update(state, dirty, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    nothing = update(state, {**BATCH, "where": np.zeros(N, bool)}, jax.random.key(1))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))
    np.testing.assert_array_equal(nothing[1]["loss"], 0)


@pytest.mark.parametrize("mode", ["vmap", "shard_map"])
def test_training_is_equal_on_every_axis(mode):
    net, tx, peers = mlp([8, C]), optax.sgd(0.3, momentum=0.9), 4
    plain = mutual.mean_teacher(net, tx, num_peers=peers, decay=0.9)
    start = jax.jit(plain.init)(jax.random.key(0), BATCH)

    def loop(update):
        def run(state, batch):
            state, metrics = update(state, batch, jax.random.key(9))
            body = lambda i, carry: update(carry[0], batch, jax.random.fold_in(jax.random.key(5), i))
            return jax.lax.fori_loop(0, 9, body, (state, metrics))

        return run

    expected, metrics = jax.jit(loop(plain.update))(start, BATCH)
    if mode == "vmap":
        learner = mutual.mean_teacher(net, tx, num_peers=peers, decay=0.9, axis_name="peer")
        split = jax.tree.map(lambda a: a if a.ndim == 0 else a.reshape(2, 2, *a.shape[1:]), start)
        axes = jax.tree.map(lambda a: None if a.ndim == 0 else 0, start)
        got, found = jax.jit(jax.vmap(loop(learner.update), in_axes=(axes, None), axis_name="peer"))(split, BATCH)
        got = jax.tree.map(lambda a, b: a.reshape(b.shape) if b.ndim else a[0], got, expected)
        loss = found["loss"].reshape(-1)
    else:
        mesh = jax.make_mesh((2, 4), ("peer", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        learner = mutual.mean_teacher(net, tx, num_peers=peers, decay=0.9, axis_name="peer", data_axis_name="data")
        spec = jax.tree.map(lambda a: P("peer") if a.ndim else P(), start)
        mapped = jax.shard_map(
            loop(learner.update),
            mesh=mesh,
            in_specs=(spec, P("data")),
            out_specs=(spec, P("peer")),
        )
        got, found = jax.jit(mapped)(start, BATCH)
        loss = found["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=2e-4)


def test_refuses():
    with pytest.raises(ValueError, match="num_peers=0"):
        mutual.mean_teacher(linear(), optax.sgd(0.1), num_peers=0)
    with pytest.raises(ValueError, match="decay=2"):
        mutual.mean_teacher(linear(), optax.sgd(0.1), decay=2)
    with pytest.raises(ValueError, match="kind='l1'"):
        mutual.mean_teacher(linear(), optax.sgd(0.1), kind="l1")
    z = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="must both be"):
        mutual.consistency_loss(z, z[None])
    with pytest.raises(ValueError, match="where has shape"):
        mutual.consistency_loss(z, z, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="temperature=0"):
        mutual.consistency_loss(z, z, temperature=0.0)
    with pytest.raises(ValueError, match="length=0"):
        mutual.ramp_up(jnp.array(1), length=0)
    learner = mutual.mean_teacher(linear(), optax.sgd(0.1), num_peers=3, axis_name="peer")
    with pytest.raises(ValueError, match="num_peers=3 must be divisible by the size 2"):
        jax.vmap(lambda k: learner.init(k, BATCH), in_axes=None, axis_size=2, axis_name="peer")(jax.random.key(0))


@jax.jit
def one_step(x, y, where):
    """Jitted, because step by step it would be hundreds of small programs."""
    learner = mutual.mean_teacher(mlp([C]), optax.sgd(0.1), num_peers=2)
    batch = {"x": x, "y": y, "where": where}
    _, metrics = learner.update(learner.init(jax.random.key(0), batch), batch, jax.random.key(1))
    return jnp.mean(metrics["loss"])


def ramp(step):
    return mutual.ramp_up(step, length=4).astype(step.dtype)


CASES = [
    Case(
        mutual.consistency_loss,
        {"logits": Arg("scores", (6, 4)), "teacher_logits": Arg("scores", (6, 4)), "where": Arg("where", (6,))},
        static={"kind": "kl", "temperature": 2.0},
        wrt=("logits",),
        frozen=("teacher_logits",),
        rows={"logits": 0, "teacher_logits": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        one_step,
        {"x": Arg("embeddings", (6, 4)), "y": Arg("labels", (6,)), "where": Arg("where", (6,))},
        reason="an average that started as its network is a constant, though it moves with it",
        rows={"x": 0, "y": 0, "where": 0},
        helper=True,
        name="mean_teacher",
        covers=("mutual.mean_teacher", "mutual.MeanTeacherState"),
    ),
    Case(ramp, {"step": Arg("scores", (5,))}, wrt=("step",), helper=True, covers=("mutual.ramp_up",)),
]
test_conformance = conformance.conformance_tests(CASES)
