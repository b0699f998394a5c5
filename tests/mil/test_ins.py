"""INS: prototypes, pseudo labels and both contrastive losses against loops, and the learner step by step."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import mil
from jaxlab.ops.layers import mlp

rng = np.random.default_rng(0)


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def test_prototypes_equal_the_sequential_loop_on_one_and_on_eight_devices(mesh8):
    from jax.sharding import PartitionSpec as P

    start, q, labels = unit(rng.normal(size=(3, 4))), unit(rng.normal(size=(16, 4))), rng.integers(0, 2, 16)
    where = rng.random(16) < 0.8
    expected = start.copy()
    for row, label, real in zip(q, labels, where, strict=True):
        if real:
            expected[label] = 0.9 * expected[label] + 0.1 * row
    expected = unit(expected)
    q[~where] = np.nan
    mapped = jax.shard_map(
        lambda q, y, w: mil.prototype_update(jnp.float32(start), q, y, where=w, axis_name="data"),
        mesh=mesh8, in_specs=P("data"), out_specs=P(), check_vma=False,
    )  # fmt: skip
    one, many = jax.jit(
        lambda q: (mil.prototype_update(jnp.float32(start), q, labels, where=where), mapped(q, labels, where))
    )(jnp.float32(q))
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-6)
    two = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    ahead, back = (mil.prototype_update(jnp.zeros((1, 2)), q, np.zeros(2, int)) for q in (two, two[::-1]))
    assert ahead[0, 1] > ahead[0, 0] and back[0, 0] > back[0, 1]  # the last one weighs most


def supcon_oracle(q, k, labels, queue, queue_labels, t):
    contrast, classes = np.concatenate([q, k, queue]), np.concatenate([labels, labels, queue_labels])
    terms = []
    for i in range(len(q)):
        others = [a for a in range(len(contrast)) if a != i]
        s = {a: q[i] @ contrast[a] / t for a in others}
        log_sum = np.log(sum(np.exp(v) for v in s.values()))
        terms.append(-np.mean([s[a] - log_sum for a in others if classes[a] == labels[i]]))
    return np.array(terms)


def test_contrastive_losses_equal_the_loop():
    q, k, queue = (unit(rng.normal(size=(n, 4))) for n in (5, 5, 7))
    labels, queue_labels = np.array([0, 1, 0, 2, 0]), rng.integers(0, 2, 7)
    where, filled = np.array([1, 1, 0, 1, 1], bool), np.array([1, 0, 1, 1, 1, 0, 1], bool)
    supcon = supcon_oracle(q[where], k[where], labels[where], queue[filled], queue_labels[filled], 0.2)
    moco = []
    for i in np.flatnonzero(where):
        negative = sum(np.exp(q[i] @ m / 0.2) for m in queue[filled])
        moco.append(np.log(np.exp(q[i] @ k[i] / 0.2) + negative) - q[i] @ k[i] / 0.2)
    for array, mask in ((q, where), (k, where), (queue, filled)):
        array[~mask] = np.nan
    q, k, queue = (3 * jnp.float32(a) for a in (q, k, queue))  # length does not count
    options = {"temperature": 0.2, "where": where, "kv_where": filled, "reduction": "none"}
    got = jax.jit(
        lambda q: (
            mil.partial_supcon_loss(q, k, labels, queue, queue_labels, **options),
            mil.moco_loss(q, k, queue, **options),
        )
    )(q)
    np.testing.assert_allclose(got[0][where], supcon, rtol=1e-4)
    np.testing.assert_allclose(got[1][where], moco, rtol=1e-4)
    assert got[0][2] == got[1][2] == 0


def test_distinct_labels_leave_the_key_as_the_only_positive():
    q, k = (unit(rng.normal(size=(4, 3))) for _ in range(2))
    loss = jax.jit(mil.partial_supcon_loss)
    got = loss(*map(jnp.float32, (q, k)), np.arange(4), jnp.float32(q[:0]), np.zeros(0, int))
    terms = []
    for i in range(4):
        others = [q[j] for j in range(4) if j != i] + list(k)
        terms.append(np.log(sum(np.exp(q[i] @ o / 0.07) for o in others)) - q[i] @ k[i] / 0.07)
    np.testing.assert_allclose(got, np.mean(terms), rtol=1e-4)


def test_pseudo_labels_and_schedule():
    candidates = np.asarray(mil.partial_labels(np.array([0, 1, 1])))
    np.testing.assert_array_equal(candidates, [[1, 0], [1, 1], [1, 1]])
    c = np.float32([[1, 0], [0.4, 0.6], [0.5, 0.5]])
    probs = np.float32([[0.1, 0.9], [0.3, 0.7], [0.8, 0.2]])
    got = mil.confidence_update(c, probs, candidates, decay=0.9)
    np.testing.assert_allclose(got, [[1, 0], [0.36, 0.64], [0.55, 0.45]], rtol=1e-6)
    assert got[0].tolist() == [1.0, 0.0]
    values = [float(mil.phi_schedule(i, 11)) for i in (0, 5, 10, 99)]
    np.testing.assert_allclose(values, [0.95, 0.875, 0.8, 0.8], rtol=1e-6)


M = 12
DATA = {
    "x": rng.normal(size=(M, 3)).astype(np.float32),
    "x_strong": rng.normal(size=(M, 3)).astype(np.float32),
    "y": np.repeat([0, 1], 6).astype(np.int32),
}
OPTIONS = {"num_instances": M, "warmup_steps": 2, "total_steps": 9, "queue_size": 6, "features": 4, "key_decay": 0.5}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def project(p, h):
    h = np.maximum(h @ p["inner"]["w"] + p["inner"]["b"], 0)
    return unit(h @ p["outer"]["w"] + p["outer"]["b"])


def test_learner_follows_the_algorithm_step_by_step():
    """Four steps of four rows, two in the warm-up; each is redone by hand from the state before it."""
    learner = mil.ins(mlp([5]), optax.sgd(0.05), **OPTIONS)
    rows = [rng.permutation(M)[:4] for _ in range(4)]
    batches = [{**{n: v[r] for n, v in DATA.items()}, "index": r, "where": np.array([1, 1, 1, 0], bool)} for r in rows]
    for batch in batches:
        batch["x"] = np.where(batch["where"][:, None], batch["x"], np.float32(np.nan))

    key, update = jax.random.key(0), jax.jit(learner.update)
    states, metrics = [jax.jit(learner.init)(key, batches[0])], []
    for batch in batches:
        state, made = update(states[-1], batch, key)
        states.append(state)
        metrics.append(made)
    states, metrics = jax.tree.map(np.asarray, (states, metrics))
    queue, queue_labels = [], []
    confidence = np.where(DATA["y"][:, None] == 0, [[1.0, 0.0]], [[0.5, 0.5]])
    for step, (before, after, batch) in enumerate(zip(states[:-1], states[1:], batches, strict=True)):
        params, net = before.params, before.net_state
        real = batch["index"][:3]
        x, strong, y = DATA["x"][real], DATA["x_strong"][real], DATA["y"][real]
        average = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, net["average"],
                               {n: params[n] for n in ("encoder", "projector")})  # fmt: skip
        encode = lambda p, x: x @ p["dense_0"]["w"] + p["dense_0"]["b"]
        h = encode(params["encoder"], x)
        logits = h @ params["classifier"]["w"] + params["classifier"]["b"]
        q, k = project(params["projector"], h), project(average["projector"], encode(average["encoder"], strong))
        candidates = np.where(y[:, None] == 0, [[1.0, 0.0]], [[1.0, 1.0]])
        pseudo = (softmax(logits) * candidates).argmax(1)
        if step >= 2:
            near = softmax(q @ net["prototypes"].T)
            phi = 0.95 - 0.15 * step / 8
            for i, row in enumerate(real):
                target = np.eye(2)[(near[i] * candidates[i]).argmax()]
                confidence[row] = phi * confidence[row] + (1 - phi) * target if y[i] else [1, 0]
        ce = -(confidence[real] * np.log(softmax(logits))).sum(1).mean()
        memory = np.array(queue[-6:]).reshape(-1, 4)
        if step < 2:
            s = np.concatenate([(q * k).sum(1, keepdims=True), q @ memory.T], 1) / 0.07
            contrast = np.mean(np.log(np.exp(s).sum(1)) - s[:, 0])
        else:
            contrast = supcon_oracle(q, k, pseudo, memory, np.array(queue_labels[-6:]), 0.07).mean()
        made = metrics[step]
        np.testing.assert_allclose(made["classification"], ce, rtol=1e-4)
        np.testing.assert_allclose(made["contrastive"], contrast, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(made["loss"], ce + 0.5 * contrast, rtol=1e-3)
        queue += list(k)
        queue_labels += list(pseudo)
        seen = after.net_state["confidence"][:, 0] >= 0
        np.testing.assert_allclose(after.net_state["confidence"][seen], confidence[seen], rtol=1e-5, atol=1e-6)
        kept = after.net_state["queue"][after.net_state["queue_filled"]]
        newest = np.array(queue[-6:])
        assert len(kept) == len(newest)
        assert max(np.abs(kept - row[None]).max(1).min() for row in newest) < 1e-4
    assert states[-1].step == 4 and states[-1].net_state["queue_filled"].all()


def test_bag_constraint_counts_from_its_step():
    learner = mil.ins(mlp([5]), optax.sgd(0.05), **OPTIONS, bag_steps=1, inherit_steps=1)
    bags = {"x": DATA["x"].reshape(2, 6, 3), "y": np.array([0, 1])}
    batch = {**DATA, "index": np.arange(M), "bags": bags}

    shapes = jax.eval_shape(lambda key: learner.init(key, batch), jax.random.key(0))
    state = jax.tree.map(lambda v: np.asarray(0.3 * rng.normal(size=v.shape), v.dtype), shapes)
    state.net_state["queue_filled"][:], state.net_state["confidence"][:] = False, -1
    state.step[...], state.net_state["queue_place"][...] = 0, 0

    def run(state, key):
        state, metrics = learner.update(state, batch, key)
        return state, metrics, learner.predict(state, batch)

    run = jax.jit(run)
    state, first, _ = run(state, jax.random.key(0))
    _, second, outputs = run(state, jax.random.key(0))
    assert first["bag"] == 0 and second["bag"] > 0
    np.testing.assert_allclose(outputs["probs"].sum(1), 1, rtol=1e-6)


def test_refuses():
    z = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="num_instances=0 must be"):
        mil.ins(mlp([5]), optax.sgd(0.1), **{**OPTIONS, "num_instances": 0})
    with pytest.raises(ValueError, match=r"prototype_decay=1\.5"):
        mil.ins(mlp([5]), optax.sgd(0.1), **OPTIONS, prototype_decay=1.5)
    with pytest.raises(ValueError, match="temperature=0"):
        mil.moco_loss(z, z, z, temperature=0)
    with pytest.raises(ValueError, match="queries, keys and queue must be"):
        mil.moco_loss(z, z[:2], z)
    with pytest.raises(ValueError, match=r"must be \[N\] and \[M\]"):
        mil.partial_supcon_loss(z, z, jnp.zeros(2, int), z, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="must have one shape"):
        mil.confidence_update(z, z[:2], z, decay=0.5)
    with pytest.raises(ValueError, match="prototypes and embeddings must be"):
        mil.prototype_update(z, jnp.ones((3, 4)), jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"bag_labels must be \[N\]"):
        mil.partial_labels(jnp.ones((2, 2), int))


def learner_case(x, labels, index):
    learner = mil.ins(mlp([5]), optax.sgd(0.1), **{**OPTIONS, "queue_size": 8})
    batch = {"x": x, "x_strong": x, "y": labels, "index": index}
    return learner.update(learner.init(jax.random.key(0), batch), batch, jax.random.key(1))[1]


Z, MEMORY = Arg("embeddings", (6, 4)), {"queue": Arg("embeddings", (5, 4)), "queue_labels": Arg("labels", (5,), high=2)}
CASES = [
    Case(mil.partial_supcon_loss, {"queries": Z, "keys": Z, "labels": Arg("labels", (6,), high=2), **MEMORY,
         "where": Arg("where", (6,))}, static={"temperature": 0.5}, wrt=("queries",), frozen=("keys", "queue"),
         rows={"queries": 0, "keys": 0, "labels": 0, "where": 0}, symmetry="invariant"),
    Case(mil.moco_loss, {"queries": Z, "keys": Z, "queue": MEMORY["queue"], "where": Arg("where", (6,))},
         static={"temperature": 0.5}, wrt=("queries",), frozen=("keys", "queue"), helper=True),
    Case(mil.prototype_update, {"prototypes": Arg("embeddings", (2, 4)), "embeddings": Z,
         "labels": Arg("labels", (6,), high=2), "where": Arg("where", (6,))}, helper=True,
         frozen=("prototypes", "embeddings"), reason="a moving average has no gradient"),
    Case(mil.confidence_update, {"confidence": Arg("probabilities", (5, 2)), "probs": Arg("probabilities", (5, 2)),
         "candidates": Arg("weights", (5, 2))}, static={"decay": 0.9}, helper=True,
         reason="pseudo labels have no gradient"),
    Case(lambda labels: mil.partial_labels(labels) * mil.phi_schedule(labels[0], 9), {
         "labels": Arg("labels", (4,), high=2)}, helper=True, name="partial_labels",
         covers=("mil.partial_labels", "mil.phi_schedule")),
    Case(jax.jit(learner_case), {"x": Arg("embeddings", (6, 3)), "labels": Arg("labels", (6,), high=2),
         "index": Arg("index", (6,), high=M)}, reason="metrics", helper=True, name="ins", covers=("mil.ins",),
         skip={"dtype": "metrics are float32 whatever the data are"}),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
