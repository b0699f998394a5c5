"""Modules in the place of meta modules: values by hand, who learns, who stands still, one stage as plain training."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import distill
from jaxlab.ops.layers import dense
from jaxlab.types import Layer

rng = np.random.default_rng(0)
BLOCK = Layer(dense(4).init, lambda p, h: jnp.tanh(dense(4).apply(p, h)))
PARTS = (BLOCK, dense(4), dense(3))
BATCH = {
    "x": rng.normal(size=(8, 5)).astype(np.float32),
    "y": np.array([0, 1, 2, 0, -1, 2, 1, 0], np.int32),
    "where": np.arange(8) != 7,
}


def network(stages, depth):
    return distill.stage_network(*PARTS, width=4, num_stages=stages, depth=depth)


def by_hand(stem, blocks, head, x):
    stem, head = (jax.tree.map(lambda a: np.asarray(a, np.float64), p) for p in (stem, head))
    h = x.astype(np.float64) @ stem["w"] + stem["b"]
    for block in blocks:
        h = np.tanh(h @ block["w"] + block["b"])
    return h, h @ head["w"] + head["b"]


def blocks_of(params, i):
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params["stages"])
    return [jax.tree.map(lambda a, d=d: a[i, d], wide) for d in range(wide["w"].shape[1])]


def cross_entropy(z):
    rows = [i for i in range(8) if BATCH["where"][i] and BATCH["y"][i] >= 0]
    return np.mean([np.log(np.exp(z[i]).sum()) - z[i, BATCH["y"][i]] for i in rows])


META = network(3, 1).init(jax.random.key(0), 5)


def test_losses_equal_the_hybrids_by_hand():
    learner = distill.deep_incubation(*PARTS, META, optax.sgd(0.1), width=4, depth=2)
    state = learner.init(jax.random.key(1), BATCH)
    _, metrics = jax.jit(learner.update)(state, BATCH, None)
    for i in range(3):
        blocks = [b for j in range(3) for b in blocks_of(state.params if j == i else META, j)]
        stem, head = (state.params if i == 0 else META)["stem"], (state.params if i == 2 else META)["head"]
        np.testing.assert_allclose(
            metrics["loss"][i], cross_entropy(by_hand(stem, blocks, head, BATCH["x"])[1]), rtol=1e-5
        )
    blocks = [b for j in range(3) for b in blocks_of(state.params, j)]
    expected = by_hand(state.params["stem"], blocks, state.params["head"], BATCH["x"])[1]
    np.testing.assert_allclose(learner.predict(state, BATCH)["logits"], expected, rtol=1e-4, atol=1e-5)

    imitation = distill.deep_incubation(*PARTS, META, optax.sgd(0.1), width=4, depth=2, objective="imitation")
    state = imitation.init(jax.random.key(1), BATCH)
    _, metrics = jax.jit(imitation.update)(state, BATCH, None)
    for i in range(3):
        before = [b for j in range(i) for b in blocks_of(META, j)]
        goal, _ = by_hand(META["stem"], before + blocks_of(META, i), META["head"], BATCH["x"])
        stem = (state.params if i == 0 else META)["stem"]
        got, _ = by_hand(stem, before + blocks_of(state.params, i), META["head"], BATCH["x"])
        np.testing.assert_allclose(metrics["loss"][i], np.mean((got - goal)[BATCH["where"]] ** 2), rtol=1e-4)


def test_meta_modules_as_modules_change_nothing():
    learner = distill.deep_incubation(*PARTS, META, optax.sgd(0.1), width=4, depth=1)
    state = learner.init(jax.random.key(1), BATCH)
    state = state.__class__(META, {}, state.opt_state, state.step)
    _, metrics = jax.jit(learner.update)(state, BATCH, None)
    loss = cross_entropy(np.asarray(network(3, 1).apply(META, BATCH["x"]), np.float64))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(distill.interface_gap(BLOCK, dense(4), META, META, BATCH["x"]), 0)


def test_a_module_learns_as_if_it_were_alone():
    """Its gradient is that of its own hybrid; the meta network stands still, bit for bit."""
    learner = distill.deep_incubation(*PARTS, META, optax.sgd(1.0), width=4, depth=2)
    state, before = learner.init(jax.random.key(1), BATCH), jax.tree.map(np.array, META)
    new, _ = jax.jit(learner.update)(state, BATCH, None)

    def alone(stage):
        z, y = _hybrid(stage), jnp.asarray(BATCH["y"])
        keep = jnp.asarray(BATCH["where"]) & (y >= 0)
        each = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
        return jnp.sum(jnp.where(keep, each, 0.0)) / jnp.sum(keep)

    def _hybrid(stage):
        h = dense(4).apply(META["stem"], BATCH["x"])
        pick = lambda tree, *at: jax.tree.map(lambda a: a[at], tree)
        for params in (pick(META["stages"], 0, 0), pick(stage, 0), pick(stage, 1), pick(META["stages"], 2, 0)):
            h = BLOCK.apply(params, h)
        return dense(3).apply(META["head"], h)

    middle = jax.tree.map(lambda a: a[1], state.params["stages"])
    grads = jax.grad(alone)(middle)
    moved = jax.tree.map(lambda a, b: a[1] - b[1], state.params["stages"], new.params["stages"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, grads)
    jax.tree.map(np.testing.assert_array_equal, META, before)


def test_one_stage_is_plain_training():
    meta, net = network(1, 1).init(jax.random.key(0), 5), network(1, 3)
    learner = distill.deep_incubation(*PARTS, meta, optax.adam(1e-2), width=4, depth=3)
    state = learner.init(jax.random.key(1), BATCH)
    params, tx = state.params, optax.adam(1e-2)
    opt_state, keep = tx.init(params), jnp.asarray(BATCH["where"]) & (jnp.asarray(BATCH["y"]) >= 0)

    def loss(params):
        each = optax.softmax_cross_entropy_with_integer_labels(
            net.apply(params, BATCH["x"]), jnp.maximum(BATCH["y"], 0)
        )
        return jnp.sum(jnp.where(keep, each, 0.0)) / jnp.sum(keep)

    update, grad = jax.jit(learner.update), jax.jit(jax.grad(loss))
    for _ in range(5):
        state, _ = update(state, BATCH, None)
        updates, opt_state = tx.update(grad(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, params)


def test_gap_equals_the_loop():
    params = network(3, 2).init(jax.random.key(3), 5)
    got = distill.interface_gap(BLOCK, dense(4), params, META, BATCH["x"])
    for i in range(3):
        before = [b for j in range(i) for b in blocks_of(META, j)]
        goal, _ = by_hand(META["stem"], before + blocks_of(META, i), META["head"], BATCH["x"])
        stem = (params if i == 0 else META)["stem"]
        own, _ = by_hand(stem, before + blocks_of(params, i), META["head"], BATCH["x"])
        length = lambda a: np.mean(np.linalg.norm(a, axis=1))
        np.testing.assert_allclose(got[i], length(own - goal) / length(goal), rtol=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match="depth=0"):
        network(2, 0)
    with pytest.raises(ValueError, match="objective='both'"):
        distill.deep_incubation(*PARTS, META, optax.sgd(0.1), width=4, depth=2, objective="both")
    with pytest.raises(ValueError, match="params has 2 stages"):
        distill.interface_gap(BLOCK, dense(4), network(2, 1).init(jax.random.key(0), 5), META, BATCH["x"])


cast = lambda tree, dtype: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def net_case(x):
    return network(3, 1).apply(cast(META, x.dtype), x)


def gap_case(x):
    deep = jax.tree.map(lambda a: a + 0.1, META)
    return jnp.sum(distill.interface_gap(BLOCK, dense(4), cast(deep, x.dtype), cast(META, x.dtype), x))


@jax.jit
def one_step(x, y, where):
    learner = distill.deep_incubation(*PARTS, cast(META, x.dtype), optax.sgd(0.1), width=4, depth=2)
    batch = {"x": x, "y": y, "where": where}
    return jnp.sum(learner.update(learner.init(jax.random.key(0), batch), batch, None)[1]["loss"])


X = {"x": Arg("embeddings", (6, 5))}
CASES = [
    Case(net_case, X, wrt=("x",), rows={"x": 0}, symmetry="equivariant", helper=True, name="stage_network",
         covers=("distill.stage_network",)),
    Case(gap_case, X, wrt=("x",), rows={"x": 0}, helper=True, name="interface_gap", covers=("distill.interface_gap",)),
    Case(
        one_step,
        {**X, "y": Arg("labels", (6,)), "where": Arg("where", (6,))},
        reason="the loss of a step before its update; the hybrids by hand are the test",
        rows={"x": 0, "y": 0, "where": 0},
        helper=True,
        name="deep_incubation",
        covers=("distill.deep_incubation",),
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
