"""Every router under the same invariants of a plan, and each against its own loop."""

import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe
from jaxlab.types import StatefulLayer

rng = np.random.default_rng(0)
T, D, E = 8, 5, 6
TABLE = np.array([[0, 3], [2, 5], [4, 1], [-1, 2]])
BIAS = np.float32(rng.normal(size=E))
IDS = np.array([0, 1, 2, 3, 0, 7, -1, 1])

# Routers of E experts, and whether each token's result depends on that token alone.
ROUTERS = {
    "top_k": (moe.top_k_router(E, 2), True),
    "top_k group-limited": (moe.top_k_router(E, 2, groups=3, groups_kept=2), True),
    "top_k per group": (moe.top_k_router(E, 3, groups=3, per_group=True, renormalize=False), True),
    "sigmoid": (moe.sigmoid_router(E, 2, groups=2, groups_kept=1, scale=2.5), True),
    "hash": (moe.hash_router(TABLE, E), True),
    "dselect_k": (moe.dselect_k_router(E, 2), True),
    "dselect_k static": (moe.dselect_k_router(E, 2, per_token=False), True),
    "dselect_k narrow": (moe.dselect_k_router(E, 2, max_active=2), True),
    "comet": (moe.comet_gate(E, 2), True),
    "comet narrow": (moe.comet_gate(E, 2, max_active=2, selector_bias=False, eps=1e-6, threshold=1e-5), True),
    "relu": (moe.relu_router(E), True),
    "expert_choice": (moe.expert_choice_router(E, 1.5), False),
    "sinkhorn": (moe.sinkhorn_router(E, 2, epsilon=0.3), False),
    "base": (moe.base_router(E), False),
    "permuted": (moe.permutation_search(moe.comet_gate(E, 2), E, steps=10, num_permutations=2), True),
}


def start(router, scale=1.0, seed=0):
    """Parameters of about unit size (a fresh router is nearly indifferent), and the state of a stateful one."""
    params = router.init(jax.random.key(seed), D)
    params, state = params if isinstance(router, StatefulLayer) else (params, None)
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda a: np.float32(draw.normal(size=a.shape) * scale), params)
    return params, {"bias": BIAS} if state is not None and "bias" in state else state


def apply(name, x, where=None, params=None, ids=IDS):
    router = ROUTERS[name][0]
    own, state = start(router)
    own = own if params is None else params
    inputs = {"ids": jnp.asarray(ids)} if name == "hash" else {}
    if name in ("sinkhorn", "base", "permuted"):
        inputs["train"] = True
    if state is None:
        return router.apply(own, x, where=where, **inputs)
    return router.apply(own, state, x, where=where, **inputs)[0]


def check_plan(plan, where):
    experts, used = plan.num_experts, plan.expert < plan.num_experts
    assert plan.token.dtype == plan.expert.dtype == plan.counts.dtype == plan.dropped.dtype == np.int32
    assert plan.weight.dtype == plan.scores.dtype == plan.logits.dtype == np.float32
    assert np.all(np.diff(plan.expert) >= 0), "assignments are not sorted by expert"
    pairs = plan.expert.astype(int) * len(where) + plan.token
    assert np.all(np.diff(pairs[used]) > 0), "tokens of an expert are not in order, or one is there twice"
    assert np.array_equal(plan.counts, np.bincount(plan.expert[used], minlength=experts))
    assert np.all(plan.weight >= 0) and np.all(plan.weight[~used] == 0)
    assert np.all(where[plan.token[used]]), "a token that does not exist is routed"
    assert plan.scores.shape == plan.logits.shape == (len(where), experts)
    for leaf in (plan.weight, plan.scores[where], plan.logits[where]):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", ROUTERS)
def test_plans_keep_their_invariants(name):
    """Masked tokens that hold NaN, under vmap and grad; the kept ones give what they give alone."""
    x = rng.normal(size=(2, T, D)).astype(np.float32)
    where = np.array([[1, 1, 0, 1, 1, 0, 1, 1], [1] * 8], bool)
    dirty = np.where(where[:, :, None], x, np.nan).astype(np.float32)

    def total(x, where):
        plan = apply(name, x, where)
        return jnp.sum(moe.dense_weights(plan) * jnp.cos(jnp.arange(T * E).reshape(T, E))), plan

    run = jax.jit(jax.vmap(jax.value_and_grad(total, has_aux=True)))
    (_, plans), grads = jax.tree.map(np.asarray, run(dirty, where))
    assert np.all(np.isfinite(grads)) and not np.any(grads[~where])
    if name not in ("hash", "dselect_k static"):
        assert np.any(grads), "no gradient reaches the tokens"
    for i in range(2):
        plan = jax.tree.map(lambda a, i=i: a[i], plans)
        check_plan(plan, where[i])
    if ROUTERS[name][1]:
        alone = jax.jit(lambda x: apply(name, x, ids=IDS[where[0]]))(x[0][where[0]])
        dense = moe.dense_weights(jax.tree.map(lambda a: a[0], plans))
        np.testing.assert_allclose(dense[where[0]], moe.dense_weights(alone), atol=1e-5)
    half = jax.eval_shape(lambda x: apply(name, x), jnp.zeros((T, D), jnp.bfloat16))
    assert half.weight.dtype == half.scores.dtype == half.logits.dtype == jnp.float32


def test_a_layer_of_any_router_equals_the_sum_over_its_experts():
    x = rng.normal(size=(T, D)).astype(np.float32)
    experts = moe.swiglu_experts(E, 3)
    weights = experts.init(jax.random.key(1), D)
    each = [jax.nn.silu(x @ weights["gate"][e]) * (x @ weights["up"][e]) @ weights["down"][e] for e in range(E)]
    for name, extra in (("comet", {}), ("hash", {"ids": jnp.asarray(IDS)}), ("sigmoid", {}), ("permuted", {})):
        router = ROUTERS[name][0]
        layer, (params, state) = moe.moe_layer(router, experts), start(router)
        both = {"router": params, "experts": weights}
        if state is None:
            y, plan = jax.jit(layer.apply)(both, x, **extra)
        else:
            (y, plan), same = jax.jit(lambda b, s, x, layer=layer: layer.apply(b, s, x))(both, state, x)
            jax.tree.map(np.testing.assert_array_equal, same, state)
        dense = np.asarray(moe.dense_weights(plan))
        np.testing.assert_allclose(y, sum(dense[:, e, None] * each[e] for e in range(E)), atol=1e-5)
    assert set(layer.init(jax.random.key(0), D)[0]) == {"router", "experts"}


def test_plan_from_weights_cuts_the_smallest_and_says_so():
    weights = np.float32([[0.1, 0.6, 0, 0.3], [0, 0, 0, 0], [np.nan, 1, -1, 0], [0.25, 0.25, 0.25, 0.25]])
    for room in range(1, 5):
        plan = jax.tree.map(np.asarray, moe.plan_from_weights(jnp.asarray(weights), max_active=room))
        check_plan(plan, np.array([1, 0, 1, 1], bool))
        best = [[1, 3, 0][:room], [], [1], [0, 1, 2, 3][:room]]
        expected = np.zeros((4, 4))
        for t, experts in enumerate(best):
            expected[t, experts] = weights[t, experts]
        np.testing.assert_allclose(moe.dense_weights(plan), expected)
        assert plan.dropped == 8 - sum(map(len, best)) and len(plan.token) == 4 * room


def test_dselect_k_equals_the_loop_over_bits():
    x = rng.normal(size=(T, D))
    for experts in (5, 8):
        router = moe.dselect_k_router(experts, 2, width=3.0)
        params, _ = start(router)
        p = jax.tree.map(np.float64, params)
        bits = math.ceil(math.log2(experts))
        selectors, gates = np.zeros((T, 2, experts)), np.zeros((T, 2, experts))
        for t in range(T):
            a = x[t] @ p["w"]["a"] + p["bias"]["a"]
            for s in range(2):
                z = np.clip((x[t] @ p["w"]["z"][:, s] + p["bias"]["z"][s]) / 3.0, -0.5, 0.5)
                q = -2 * z**3 + 1.5 * z + 0.5
                for e in range(experts):
                    digits = np.binary_repr(e, bits)
                    selectors[t, s, e] = math.prod(q[b] if digits[b] == "1" else 1 - q[b] for b in range(bits))
                    gates[t, s, e] = np.exp(a[s]) / np.exp(a).sum() * selectors[t, s, e]
        where = np.arange(T) < 6

        def run(params, x, where, router=router):
            plan = router.apply(params, x, where=where)
            return plan, moe.selector_entropy(plan, where=where), moe.reachability_penalty(plan, where=where)

        plan, entropy, penalty = jax.jit(run)(params, jnp.float32(x), where)
        kept = selectors[:6]
        np.testing.assert_allclose(plan.selectors[:6], kept, atol=1e-5)
        np.testing.assert_allclose(plan.scores[:6], gates[:6].sum(1), atol=1e-5)
        np.testing.assert_allclose(entropy, np.mean((-kept * np.log(kept + 1e-6)).sum((1, 2))), rtol=1e-4)
        np.testing.assert_allclose(penalty, np.mean((1 / np.maximum(kept.sum(2), 1e-6)).sum(1)), rtol=1e-3)
    settled, entropy, penalty = jax.jit(run)(params, jnp.float32(1e6 * x), where)
    assert int(settled.counts.sum()) <= 2 * 6 and entropy < 1e-4
    assert penalty == 2  # 8 = 2^3 codes, every one an expert
    static = moe.dselect_k_router(5, 2, per_token=False)
    assert set(static.init(jax.random.key(0), D)) == {"bias"}


def test_regularisers_over_the_global_batch():
    x = rng.normal(size=(4, T, D)).astype(np.float32)
    where = np.arange(4 * T).reshape(4, T) < 4 * T - 5
    gate, relu = moe.dselect_k_router(E, 2, width=4.0), moe.relu_router(E)
    params, weights = start(gate)[0], start(relu)[0]

    def values(x, where, axis_name=None):
        plan, sparse = gate.apply(params, x, where=where), relu.apply(weights, x, where=where)
        options = {"where": where, "axis_name": axis_name}
        return (
            moe.selector_entropy(plan, **options),
            moe.reachability_penalty(plan, **options),
            moe.relu_penalty(sparse, k=2, **options),
            moe.update_relu_coefficient(jnp.float32(1), sparse, k=2, **options),
            moe.update_bias({"bias": BIAS}, sparse.counts, axis_name=axis_name)["bias"],
        )

    whole = jax.jit(values)(x.reshape(-1, D), where.reshape(-1))
    spread = jax.jit(jax.vmap(lambda x, w: values(x, w, "data"), axis_name="data"))(x, where)
    for a, b in zip(whole, spread, strict=True):
        np.testing.assert_allclose(b, np.stack([a] * 4), rtol=1e-5)
    w = np.maximum(x.reshape(-1, D).astype(np.float64) @ weights["w"], 0)[where.reshape(-1)]
    share = (w > 0).mean(0) * E / 2
    np.testing.assert_allclose(whole[2], np.mean([sum(share * row) for row in w]), rtol=1e-5)
    np.testing.assert_allclose(whole[3], 1.2 ** np.sign((w > 0).sum(1).mean() - 2), rtol=1e-6)
    load = (w > 0).sum(0)
    moved = BIAS + 1e-3 * np.sign(load.mean() - load)
    np.testing.assert_allclose(whole[4], moved - moved.mean(), atol=1e-6)


def test_expert_choice_equals_the_loop():
    x, where = rng.normal(size=(T, D)).astype(np.float32), np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
    params, _ = start(moe.expert_choice_router(E))
    for factor, capacity in ((1.5, 2), (5.0, 7), (6.0, 8)):
        plan = jax.jit(moe.expert_choice_router(E, factor).apply)(params, x, where=where)
        p = np.exp(x.astype(np.float64) @ params["w"])
        p = p / p.sum(1, keepdims=True)
        expected = np.zeros((T, E))
        for e in range(E):
            best = [t for t in np.argsort(-p[:, e]) if where[t]][:capacity]
            expected[best, e] = p[best, e]
        np.testing.assert_allclose(moe.dense_weights(plan), expected, rtol=1e-5)
        assert np.all(np.asarray(plan.counts) == min(capacity, 7))
        assert int(plan.dropped) == int((expected[where].sum(1) == 0).sum())


def test_sigmoid_router_equals_the_loop_and_its_bias_balances():
    x = rng.normal(size=(64, D)).astype(np.float32)
    router = moe.sigmoid_router(E, 2, scale=2.5)
    params, state = start(router)
    plan, _ = jax.jit(router.apply)(params, state, x)
    p = 1 / (1 + np.exp(-x.astype(np.float64) @ params["w"]))
    expected = np.zeros((64, E))
    for t in range(64):
        best = np.argsort(-(p[t] + BIAS))[:2]
        expected[t, best] = 2.5 * p[t, best] / p[t, best].sum()
    np.testing.assert_allclose(moe.dense_weights(plan), expected, rtol=1e-4, atol=1e-6)

    def step(state, _):
        counts = router.apply(params, state, x)[0].counts
        return moe.update_bias(state, counts, rate=0.01), counts

    state, counts = jax.jit(lambda s: jax.lax.scan(step, s, None, length=300))({"bias": jnp.zeros(E)})
    assert np.ptp(counts[-1]) <= 4 < np.ptp(counts[0])
    assert abs(float(state["bias"].mean())) < 1e-6


def test_balanced_routers_balance_in_training_only():
    optimize = pytest.importorskip("scipy.optimize")
    x = rng.normal(size=(24, D)).astype(np.float32) + 1
    params, _ = start(moe.base_router(E))
    logits = x @ params["w"]
    plan, best = jax.jit(lambda x: tuple(moe.base_router(E).apply(params, x, train=t) for t in (True, False)))(x)
    assert np.all(np.asarray(plan.counts) == 4)
    dense = np.asarray(moe.dense_weights(plan))
    rows, columns = optimize.linear_sum_assignment(-np.repeat(logits, 4, axis=1))
    np.testing.assert_allclose(logits[dense > 0].sum(), logits[rows, columns // 4].sum(), rtol=1e-5)
    np.testing.assert_allclose(dense[dense > 0], 1 / (1 + np.exp(-logits[dense > 0])), rtol=1e-5)
    soft = moe.sinkhorn_router(E, epsilon=0.02, iterations=200)
    trained, plain = jax.jit(lambda x: tuple(soft.apply(params, x, train=t) for t in (True, False)))(x)
    assert np.ptp(trained.counts) <= 2 < np.ptp(plain.counts)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weights = np.asarray(moe.dense_weights(trained))
    np.testing.assert_allclose(weights[weights > 0], p[weights > 0], rtol=1e-5)
    assert np.array_equal(np.asarray(moe.dense_weights(best)).argmax(1), logits.argmax(1))


def phi(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("k", [2, E])
def test_the_noisy_gate_equals_the_loop(k):
    """Weights, smooth load and its loss, for the noise that the key draws; without it in evaluation."""
    router = moe.noisy_top_k_router(E, k, hidden=True)
    draw = {n: np.float32(rng.normal(size=s)) for n, s in {"w": (D, E), "noise": (D, E), "v": (E, E)}.items()}
    x, where, key = rng.normal(size=(T, D)).astype(np.float32), np.arange(T) < T - 2, jax.random.key(3)
    dirty = np.where(where[:, None], x, np.nan).astype(np.float32)

    def run(p, train):
        plan = router.apply(p, dirty, where=where, key=key, train=train)
        return moe.load_loss(plan), (plan, moe.dense_weights(plan), moe.importance_loss(plan), plan.load)

    grads = jax.value_and_grad(lambda p: run(p, True), has_aux=True)
    both = jax.jit(lambda p: (grads(p), run(p, False)))
    ((loss, (plan, dense, importance, load)), grad), (_, (_, quiet, _, counts)) = both(draw)
    z = np.tanh(x.astype(np.float64) @ draw["w"]) @ draw["v"]
    sigma = np.log1p(np.exp(x.astype(np.float64) @ draw["noise"])) + 1e-2
    noise = np.asarray(jax.random.normal(key, (T, E)), np.float64)
    expected, expected_load, plain = np.zeros((T, E)), np.zeros(E), np.zeros((T, E))
    for t in np.flatnonzero(where):
        h = z[t] + sigma[t] * noise[t]
        for target, scores in ((expected, h), (plain, z[t])):
            best = np.argsort(-scores)[:k]
            target[t, best] = np.exp(scores[best]) / np.exp(scores[best]).sum()
        for e in range(E):
            others = sorted((h[i] for i in range(E) if i != e), reverse=True)
            expected_load[e] += phi((z[t, e] - others[k - 1]) / sigma[t, e]) if k < E else 1
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quiet, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(load, expected_load, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, expected_load.var() / expected_load.mean() ** 2, rtol=1e-3, atol=1e-6)
    total = expected.sum(0)
    np.testing.assert_allclose(importance, total.var() / total.mean() ** 2, rtol=1e-3, atol=1e-6)
    assert np.array_equal(counts, (plain > 0).sum(0)) and np.array_equal(plan.counts, (expected > 0).sum(0))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grad)) and np.any(grad["noise"]) == (k < E)


def test_hash_router_reads_its_table():
    router = moe.hash_router(TABLE, E)
    expected = np.zeros((T, E))
    for t, i in enumerate(IDS):
        for e in TABLE[i] if 0 <= i < len(TABLE) else []:
            if e >= 0:
                expected[t, e] = 0.5
    np.testing.assert_allclose(moe.dense_weights(router.apply({}, jnp.ones((T, D)), ids=jnp.asarray(IDS))), expected)
    frequencies = rng.zipf(1.5, 500).clip(max=50)
    table = moe.balanced_hash(frequencies, 7)
    assert np.ptp(np.bincount(table, weights=frequencies)) <= 1


def test_refuses():
    for make, match in (
        (lambda: moe.top_k_router(4, 2, score_function="none"), "score_function='none'"),
        (lambda: moe.sigmoid_router(4, 5), "k=5 must be between 1 and num_experts=4"),
        (lambda: moe.dselect_k_router(4, 5), "k=5 must be between 1 and num_experts=4"),
        (lambda: moe.dselect_k_router(4, 2, width=0), "width=0 must be positive"),
        (lambda: moe.dselect_k_router(4, 2, max_active=9), "max_active=9"),
        (lambda: moe.relu_router(4, max_active=0), "max_active=0"),
        (lambda: moe.sinkhorn_router(4, 0), "k=0"),
        (lambda: moe.base_router(0), "num_experts=0"),
        (lambda: moe.noisy_top_k_router(4, 5), "k=5 must be between 1 and num_experts=4"),
        (lambda: moe.noisy_top_k_router(4, eps=-1.0), "eps=-1.0"),
        (lambda: moe.noisy_top_k_router(4).apply({}, jnp.ones((2, 3)), train=True), "key is needed"),
        (lambda: moe.load_loss(apply("relu", jnp.ones((T, D)))), "must be a NoisyPlan"),
        (lambda: moe.squared_variation(jnp.ones((2, 2))), "x must be"),
        (lambda: moe.expert_choice_router(4, 0.0), "capacity_factor=0.0"),
        (lambda: moe.hash_router(jnp.ones(3), 4), "table must be int"),
        (lambda: moe.balanced_hash(np.ones((2, 2)), 4), "frequencies must be"),
        (lambda: moe.plan_from_weights(jnp.ones(3)), "weights must be"),
        (lambda: moe.plan_from_weights(jnp.ones((3, 4)), max_active=5), "max_active=5"),
        (lambda: moe.plan_from_ids(jnp.ones((3, 1), int), jnp.ones((3, 2)), jnp.ones((3, 4)), jnp.ones((3, 4))), "ids"),
        (lambda: moe.plan_from_gates(jnp.ones((3, 4)), jnp.ones((3, 4))), "gates and selectors must be"),
        (lambda: moe.selector_entropy(apply("relu", jnp.ones((T, D)))), "must be a GatePlan"),
        (lambda: moe.reachability_penalty(apply("relu", jnp.ones((T, D)))), "must be a GatePlan"),
        (lambda: moe.relu_penalty(apply("relu", jnp.ones((T, D))), k=0), "k=0"),
        (lambda: apply("relu", jnp.ones((2, T, D))), "x must be"),
        (lambda: apply("relu", jnp.ones((T, D)), jnp.ones(3, bool)), "where has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def case(name, covers, **options):
    router = ROUTERS[name][0]
    params = start(router)[0]

    def run(x, where):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        cast = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
        return moe.dense_weights(apply(name, x, where, cast)).astype(x.dtype)

    args = {"x": Arg("activations", (T, D)), "where": Arg("where", (T,))}
    return Case(run, args, wrt=("x",), rows={"x": 0, "where": 0}, symmetry="equivariant", name=name,
                covers=tuple(f"moe.{n}" for n in covers), **options)  # fmt: skip


def regularisers(x, where, axis_name=None):
    gate, relu = ROUTERS["dselect_k"][0], ROUTERS["relu"][0]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cast = lambda router: jax.tree.map(lambda a: jnp.asarray(a, dtype), start(router)[0])
    plan, sparse = gate.apply(cast(gate), x, where=where), relu.apply(cast(relu), x, where=where)
    options = {"where": where, "axis_name": axis_name}
    entropy, penalty = moe.selector_entropy(plan, **options), moe.reachability_penalty(plan, **options)
    return entropy + 0.1 * penalty + moe.relu_penalty(sparse, k=2, **options)


def steps(counts_like, coefficient):
    plan = moe.plan_from_weights(jax.nn.relu(counts_like))
    bias = moe.update_bias({"bias": counts_like[0]}, plan.counts)["bias"]
    return bias, moe.update_relu_coefficient(coefficient, plan, k=2)


def noisy(x, key):
    router = moe.noisy_top_k_router(E, 2)
    w = jnp.cos(jnp.arange(D * E, dtype=jnp.promote_types(x.dtype, jnp.float32))).reshape(D, E)
    plan = router.apply({"w": w, "noise": w}, x, key=key, train=True)
    return moe.dense_weights(plan).astype(x.dtype), moe.load_loss(plan).astype(x.dtype)


def plans(weights, ids):
    plan = moe.plan_from_weights(weights, max_active=2)
    known = moe.plan_from_ids(ids, weights[:, :2], weights, weights)
    gates = moe.plan_from_gates(weights[:, None], weights[:, None])
    return tuple(moe.dense_weights(p).astype(weights.dtype) for p in (plan, known, gates))


def balanced_hash(frequencies):
    return moe.balanced_hash(frequencies, 3)


PLANS = ("plan_from_weights", "plan_from_ids", "plan_from_gates", "dense_weights", "GatePlan")
CASES = [
    case("dselect_k", ["dselect_k_router"]),
    case("top_k", ["top_k_router"], helper=True),
    case("sigmoid", ["sigmoid_router"], helper=True),
    case("relu", ["relu_router"], helper=True),
    case("expert_choice", ["expert_choice_router"], helper=True),
    case("sinkhorn", ["sinkhorn_router"], helper=True),
    case("base", ["base_router"], helper=True),
    Case(lambda x: apply("hash", x).weight.astype(x.dtype), {"x": Arg("activations", (T, D))},
         reason="ids alone decide", name="hash", covers=("moe.hash_router",), helper=True),
    Case(regularisers, {"x": Arg("activations", (T, D)), "where": Arg("where", (T,))}, wrt=("x",), helper=True,
         rows={"x": 0, "where": 0}, symmetry="invariant",
         covers=("moe.selector_entropy", "moe.reachability_penalty", "moe.relu_penalty")),
    Case(steps, {"counts_like": Arg("scores", (T, E)), "coefficient": Arg("weights")}, reason="no gradient by design",
         helper=True, covers=("moe.update_bias", "moe.update_relu_coefficient")),
    Case(plans, {"weights": Arg("probabilities", (T, E)), "ids": Arg("index", (T, 2))}, wrt=("weights",), helper=True,
         covers=tuple(f"moe.{n}" for n in PLANS)),
    Case(balanced_hash, {"frequencies": Arg("weights", (9,))}, host=True, covers=("moe.balanced_hash",)),
    Case(noisy, {"x": Arg("activations", (6, D)), "key": Arg("key")}, wrt=("x",), helper=True,
         covers=("moe.noisy_top_k_router", "moe.load_loss", "moe.NoisyPlan")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
