"""COMET against a recursion over its trees, and its permutation search against loops and SciPy."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)
T, D = 6, 4


def oracle(params, x, experts, k, width=1.0, eps=1e-8, threshold=0.0):
    """The gate of one token as the official code walks it: node by node, leaves from left to right, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    scores, chances = [[] for _ in range(k)], [[] for _ in range(k)]

    def split(u):
        v = u / width
        return 0.0 if v <= -0.5 else 1.0 if v >= 0.5 else -2 * v**3 + 1.5 * v + 0.5

    def walk(tree, node, chance):
        if node >= experts - 1:
            e = len(scores[tree])
            value = x @ p["leaves"]["w"][:, tree, e] + p["leaves"]["b"][tree, e]
            scores[tree].append(value + np.log(chance + eps) if chance > threshold else -np.inf)
            chances[tree].append(chance)
            return
        bias = p["splits"]["b"][tree, node] if "b" in p["splits"] else 0.0
        left = split(x @ p["splits"]["w"][:, tree, node] + bias)
        walk(tree, 2 * node + 1, left * chance)
        walk(tree, 2 * node + 2, (1 - left) * chance)

    for tree in range(k):
        walk(tree, 0, 1.0)
    s = np.array(scores)
    g = np.exp(s - s.max())
    return g / g.sum(), np.array(chances)


def start(gate, scale=1.0, seed=0):
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: gate.init(key, D), jax.random.key(0))
    return jax.tree.map(lambda a: np.float32(draw.normal(size=a.shape) * scale), shapes)


VARIANTS = {
    "original": {},
    "port": {"selector_bias": False, "eps": 1e-6, "threshold": 1e-5},
    "wide": {"width": 4.0, "threshold": 0.05},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("experts", [2, 6])
def test_equals_the_walk_through_the_trees(variant, experts):
    options = VARIANTS[variant]
    gate = moe.comet_gate(experts, 2, **options)
    params, x = start(gate, 0.3), rng.normal(size=(T, D)).astype(np.float32)
    assert ("b" in params["splits"]) == (variant != "port")
    plan = jax.jit(gate.apply)(params, x)
    numeric = {n: v for n, v in options.items() if n != "selector_bias"}
    for t in range(T):
        g, chances = oracle(params, x[t].astype(np.float64), experts, 2, **numeric)
        np.testing.assert_allclose(plan.gates[t], g, atol=2e-6)
        np.testing.assert_allclose(plan.selectors[t], chances, atol=2e-6)
        np.testing.assert_allclose(plan.scores[t], g.sum(0), atol=2e-6)
    np.testing.assert_allclose(moe.dense_weights(plan), plan.scores, atol=1e-7)
    np.testing.assert_allclose(jax.nn.softmax(plan.logits), plan.scores, atol=1e-6)
    np.testing.assert_allclose(plan.scores.sum(1), 1, atol=1e-6)
    active = (np.asarray(plan.scores) > 0).sum()
    assert int(plan.counts.sum()) == active and int(plan.dropped) == 0


@pytest.mark.parametrize("experts", [1, 5, 7])
def test_settled_trees_select_at_most_k_experts_and_the_room_is_kept(experts):
    k = min(2, experts)
    gate, narrow = moe.comet_gate(experts, k), moe.comet_gate(experts, k, max_active=1)
    params, x = start(gate), rng.normal(size=(T, D)).astype(np.float32)

    def run(x):
        plan = gate.apply(params, x)
        return plan, narrow.apply(params, x), moe.selector_entropy(plan)

    hard, cut, entropy = jax.jit(run)(1e6 * x)
    active = (np.asarray(hard.scores) > 0).sum(1)
    assert active.max() <= k and set(np.unique(hard.selectors)) <= {0.0, 1.0} and entropy < 1e-4
    assert int(cut.dropped) == int((active - 1).sum()) and len(cut.token) == T
    np.testing.assert_array_equal(cut.weight[cut.expert < experts].sort(), np.sort(np.asarray(hard.scores).max(1)))


def test_a_fresh_gate_is_nearly_indifferent_and_trains_from_the_first_step():
    gate = moe.comet_gate(8, 2)
    params = gate.init(jax.random.key(0), D)
    assert np.abs(params["splits"]["w"]).max() <= 0.01 and np.abs(params["leaves"]["w"]).max() <= 0.05
    x = rng.normal(size=(T, D)).astype(np.float32)
    plan = gate.apply(params, x)
    np.testing.assert_allclose(plan.scores, 1 / 8, atol=0.05)
    grad = jax.jit(jax.grad(lambda p: jnp.sum(gate.apply(p, x).scores ** 2)))(params)
    assert all(np.any(g) for g in jax.tree.leaves(grad))


def test_schedule_and_soft_permutations_equal_the_loop():
    for step, tau, iterations in ((0, 1e-3, 20), (50, 1e-5, 85), (99, 10**-6.96, 148), (300, 1e-7, 150)):
        got = moe.permutation_schedule(step, 100)
        np.testing.assert_allclose(got[0], tau, rtol=1e-4)
        assert int(got[1]) == iterations
    search = moe.permutation_search(moe.comet_gate(4, 2), 4, steps=10, num_permutations=2)
    params, state = jax.jit(lambda key: search.init(key, D))(jax.random.key(1))
    x = rng.normal(size=(T, D)).astype(np.float32)
    plan, same = jax.jit(lambda p, s: search.apply(p, s, x, train=True))(params, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    log_m = np.asarray(params["permutation"], np.float64) / 1e-3
    for _ in range(20):
        for axis in (2, 1):
            top = log_m.max(axis, keepdims=True)
            log_m = log_m - top - np.log(np.exp(log_m - top).sum(axis, keepdims=True))
    np.testing.assert_allclose(plan.permutations, np.exp(log_m), atol=2e-3)
    m = np.asarray(plan.permutations, np.float64)
    n = m / m.sum(-1, keepdims=True)
    entropy = sum(np.mean((-a * np.log(a + 1e-6)).sum((1, 2))) for a in (m, n))
    np.testing.assert_allclose(moe.permutation_entropy(plan.permutations), entropy, rtol=1e-4, atol=1e-5)
    gates = np.asarray(moe.comet_gate(4, 2).apply(params["router"], x).gates, np.float64)
    w = np.zeros((T, 4))
    for t, j, leaf, e in np.ndindex(T, 2, 4, 4):
        w[t, e] += gates[t, j, leaf] * m[j, leaf, e]
    np.testing.assert_allclose(plan.scores, w / w.sum(1, keepdims=True), atol=1e-5)


def test_the_search_learns_a_permutation_keeps_it_and_stops():
    """Experts are the wrong way round for a fixed router: only a permutation can repair it."""
    router = moe.hash_router(jnp.arange(5), 5)
    search = moe.permutation_search(router, 5, steps=60)
    wanted = np.array([3, 0, 4, 1, 2])
    ids = jnp.arange(5)

    def loss(params, state, x):
        plan, _ = search.apply(params, state, x, train=True, ids=ids)
        error = jnp.sum((plan.scores - np.eye(5)[wanted]) ** 2)
        return error + 0.01 * moe.permutation_entropy(plan.permutations)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params, state, jnp.ones((5, D)))
        params = jax.tree.map(lambda p, g: p - 5e-4 * jnp.sign(g), params, grads)
        return (params, moe.update_permutations(params, state)), jnp.any(grads["permutation"])

    start = jax.jit(lambda key: search.init(key, D))(jax.random.key(0))
    start[0]["permutation"] = start[0]["permutation"] / 50  # as warm as the temperature: no entry underflows
    (params, state), moved = jax.jit(lambda c: jax.lax.scan(step, c, None, length=70))(start)
    assert int(state["step"]) == 70 and np.any(moved[:60]) and not np.any(moved[60:])
    assert state["columns"].tolist() == [wanted.tolist()]
    for train in (True, False):  # after the stage, and always in evaluation, the permutation is hard
        plan, _ = search.apply(params, state, jnp.ones((5, D)), train=train, ids=ids)
        np.testing.assert_array_equal(moe.dense_weights(plan), np.eye(5)[wanted])
    later = moe.update_permutations({**params, "permutation": -params["permutation"]}, state)
    assert later["columns"].tolist() == state["columns"].tolist()


def test_permuting_a_plan():
    weights = rng.random((T, 4)) * (rng.random((T, 4)) > 0.4)
    plan = moe.plan_from_weights(jnp.float32(weights))
    soft = rng.random((3, 4, 4))
    got = jax.jit(moe.permute_plan)(plan, jnp.float32(soft))
    mixed = weights @ soft.mean(0)
    np.testing.assert_allclose(
        moe.dense_weights(got), mixed / np.maximum(mixed.sum(1, keepdims=True), 1e-30), rtol=1e-4
    )
    same = moe.permute_plan(plan, jnp.eye(4))
    total = np.maximum(weights.sum(1, keepdims=True), 1e-30)
    np.testing.assert_allclose(moe.dense_weights(same), weights / total, rtol=1e-5)
    cut = moe.permute_plan(plan, jnp.eye(4), max_active=1)
    assert int(cut.dropped) == int(np.maximum((weights > 0).sum(1) - 1, 0).sum())
    hard = moe.hard_permutation(jnp.float32(soft))
    optimize = pytest.importorskip("scipy.optimize")
    for a, b in zip(soft, hard, strict=True):
        np.testing.assert_array_equal(b, np.eye(4)[optimize.linear_sum_assignment(-a)[1]])
    assert abs(float(moe.permutation_entropy(hard))) < 1e-4


def test_refuses():
    search = moe.permutation_search(moe.comet_gate(4, 2), 4, steps=5, noise=0.1)
    params, state = search.init(jax.random.key(0), D)
    plan = moe.comet_gate(4, 2).apply(params["router"], jnp.ones((T, D)))
    for make, match in (
        (lambda: moe.comet_gate(4, 5), "k=5 must be between 1 and num_experts=4"),
        (lambda: moe.comet_gate(4, 2, width=0), "width=0 and eps"),
        (lambda: moe.comet_gate(4, 2, threshold=1), "threshold=1"),
        (lambda: moe.comet_gate(4, 2, max_active=5), "max_active=5"),
        (lambda: search.apply(params, state, jnp.ones((T, D)), train=True), "key is needed"),
        (lambda: moe.permutation_search(moe.comet_gate(4, 2), 4, steps=-1), "steps=-1"),
        (lambda: moe.permute_plan(plan, jnp.ones((3, 4, 4))), "one for each of the 2 selectors"),
        (lambda: moe.permutation_entropy(jnp.ones((3, 4))), "permutations must be"),
        (lambda: moe.hard_permutation(jnp.ones((3, 4))), "permutations must be"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


GATE = moe.comet_gate(5, 2, width=4.0)
PARAMS = start(GATE, 0.5)


def comet_gate(x, where):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    plan = GATE.apply(jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS), x, where=where)
    keep = where[:, None]
    outputs = plan.scores, moe.dense_weights(plan), jnp.where(keep, plan.logits, 0.0)
    return tuple(a.astype(x.dtype) for a in outputs)


def search(x, logits):
    plan = moe.comet_gate(5, 2).apply(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), PARAMS), x)
    soft = jax.nn.softmax(logits)
    permuted = moe.permute_plan(plan, jnp.stack([soft, moe.hard_permutation(soft)]).astype(jnp.float32))
    entropy = moe.permutation_entropy(soft)
    return permuted.scores.astype(x.dtype), entropy.astype(x.dtype)


def updates(logits):
    state = {"step": jnp.int32(3), "steps": jnp.int32(9), "columns": jnp.arange(5, dtype=jnp.int32)[None]}
    new = moe.update_permutations({"permutation": 0.02 * logits[None]}, state)
    return new["columns"], moe.permutation_schedule(new["step"], 9)[1]


def searching(x):
    layer = moe.permutation_search(GATE, 5, steps=4)
    _, state = jax.eval_shape(lambda key: layer.init(key, D), jax.random.key(0))
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state) | {"columns": jnp.arange(5)[None]}
    params = {"router": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), PARAMS), "permutation": jnp.eye(5)[None]}
    return layer.apply(params, state, x)[0].scores.astype(x.dtype)


CASES = [
    Case(
        comet_gate,
        {"x": Arg("activations", (6, D)), "where": Arg("where", (6,))},
        wrt=("x",),
        rows={"x": 0, "where": 0},
        symmetry="equivariant",
        covers=("moe.comet_gate",),
    ),
    Case(search, {"x": Arg("activations", (6, D)), "logits": Arg("scores", (5, 5))}, wrt=("x", "logits"), helper=True,
         covers=("moe.permute_plan", "moe.permutation_entropy", "moe.hard_permutation")),
    Case(updates, {"logits": Arg("scores", (5, 5))}, reason="integers come out", helper=True,
         covers=("moe.update_permutations", "moe.permutation_schedule")),
    Case(searching, {"x": Arg("activations", (6, D))}, wrt=("x",), helper=True, covers=("moe.permutation_search",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
