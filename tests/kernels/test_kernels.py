"""Routing, expert feed-forward and attention against float64 loops, in value and every gradient."""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import kernels
from jaxlab.types import RoutingPlan

rng = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- routing


def routing_oracle(scores, k, bias=0.0, groups=None, kept=None, per_group=False, renormalize=False, f=softmax):
    """Chooses by explicit sorting, token by token."""
    values = f(scores.astype(np.float64))
    ids, weights = [], []
    for row in values:
        ranked = row + bias
        allowed = list(range(len(row)))
        if per_group:
            size = len(row) // groups
            chosen = []
            for g in range(groups):
                chosen += sorted(range(g * size, (g + 1) * size), key=lambda e: (-ranked[e], e))[: k // groups]
            chosen.sort(key=lambda e: -ranked[e])
        else:
            if kept is not None:
                size = len(row) // groups
                worth = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
                best = sorted(range(groups), key=lambda g: (-worth[g], g))[:kept]
                allowed = [e for e in allowed if e // size in best]
            chosen = sorted(allowed, key=lambda e: (-ranked[e], e))[:k]
        w = row[chosen]
        ids.append(chosen)
        weights.append(w / w.sum() if renormalize else w)
    return np.array(ids), np.array(weights)


OPTIONS = [
    {},
    {"renormalize": True},
    {"score_function": "sigmoid", "renormalize": True, "bias": True},
    {"groups": 4, "groups_kept": 2},
    {"groups": 2, "per_group": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[",".join(o) or "plain" for o in OPTIONS])
def test_routing_equals_the_sort(options):
    scores = rng.normal(size=(9, 8)).astype(np.float32)
    bias = rng.normal(size=8).astype(np.float32) if options.get("bias") else None
    static = {n: v for n, v in options.items() if n != "bias"}
    got = jax.jit(lambda s: kernels.top_k_routing(s, 4, bias=bias, **static))(scores)
    names = {"groups": "groups", "groups_kept": "kept", "per_group": "per_group", "renormalize": "renormalize"}
    f = (lambda x: 1 / (1 + np.exp(-x))) if static.get("score_function") == "sigmoid" else softmax
    oracle = {names[n]: v for n, v in static.items() if n in names}
    ids, weights = routing_oracle(scores, 4, 0.0 if bias is None else bias, f=f, **oracle)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_allclose(got.weights, weights, rtol=2e-6)
    np.testing.assert_array_equal(got.counts, np.bincount(ids.ravel(), minlength=8))
    np.testing.assert_array_equal(got.order, np.argsort(ids.ravel(), kind="stable"))


def test_nan_never_captures_a_slot_and_ties_go_to_the_lowest_id():
    scores = jnp.array([[0.0, jnp.nan, 0.0, 0.0], [jnp.nan] * 4, [1.0, 1.0, 1.0, 1.0]])
    weights, grad = jax.value_and_grad(lambda s: jnp.sum(kernels.top_k_routing(s, 2).weights ** 2))(scores)
    chosen = kernels.top_k_routing(scores, 2)
    assert chosen.ids[0].tolist() == [0, 2] and chosen.ids[2].tolist() == [0, 1]
    assert chosen.weights[1].tolist() == [0.0, 0.0]
    assert np.isfinite(weights) and np.all(np.isfinite(grad)) and not np.any(grad[1]) and grad[0, 1] == 0


def test_padded_tokens_are_not_counted():
    scores = jnp.array([[3.0, 0.0], [jnp.nan, 5.0]])
    chosen = kernels.top_k_routing(scores, 1, where=jnp.array([True, False]))
    assert chosen.counts.tolist() == [1, 0] and chosen.ids.tolist() == [[0], [2]] and chosen.weights[1, 0] == 0
    plan = kernels.plan_from_top_k(chosen, scores)
    assert plan.token.tolist() == [0, 1] and plan.expert.tolist() == [0, 2] and plan.weight[1] == 0


@pytest.mark.parametrize(
    "k, options, message",
    [
        (9, {}, "k=9 must be between 1 and num_experts=8"),
        (2, {"groups": 3}, "groups=3 must divide"),
        (3, {"groups": 2, "per_group": True}, "k=3 must be divisible"),
        (2, {"groups_kept": 1}, "groups is needed"),
        (2, {"score_function": "relu"}, "score_function='relu'"),
        (2, {"implementation": "pallas"}, "implementation='pallas'"),
    ],
)
def test_routing_refuses(k, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.top_k_routing(jnp.zeros((3, 8)), k, **options)


# ---- experts


def make_plan(experts, weights, tokens, num_experts, slots=None):
    """Builds a plan from lists of assignments, with unused rows at the end."""
    order = np.argsort(experts, kind="stable")
    slots = len(experts) if slots is None else slots
    pad = slots - len(experts)
    full = lambda a, v, t: np.concatenate([np.asarray(a)[order], np.full(pad, v)]).astype(t)
    zeros = np.zeros((1, num_experts), np.float32)
    counts = np.bincount(experts, minlength=num_experts).astype(np.int32)
    return RoutingPlan(
        full(tokens, 0, np.int32), full(experts, num_experts, np.int32), full(weights, 0, np.float32), counts, zeros,
        zeros, np.int32(0),
    )  # fmt: skip


def experts_oracle(x, w, plan, activation):
    y = np.zeros(x.shape)
    w = {n: np.asarray(v, np.float64) for n, v in w.items()}
    for t, e, s in zip(plan.token, plan.expert, np.asarray(plan.weight, np.float64), strict=True):
        if e == len(w["up"]):
            continue
        up = x[t] @ w["up"][e]
        if activation == "swiglu":
            gate = x[t] @ w["gate"][e]
            h = gate / (1 + np.exp(-gate)) * up
        else:
            h = np.maximum(up, 0)
        y[t] += s * (h @ w["down"][e])
    return y


def ffn_weights(e, d, f, activation="swiglu"):
    w = {"up": rng.normal(size=(e, d, f)), "down": rng.normal(size=(e, f, d))}
    if activation == "swiglu":
        w["gate"] = rng.normal(size=(e, d, f))
    return {n: (0.5 * v).astype(np.float32) for n, v in w.items()}


def grads_of(implementation, activation="swiglu"):
    def loss(x, w, scale, plan, c):
        import dataclasses

        y = kernels.expert_ffn(
            x, w, dataclasses.replace(plan, weight=scale), activation=activation, implementation=implementation
        )
        return jnp.sum(y.astype(jnp.float32) * c), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_experts_equal_the_loop_for_every_pattern_of_empty_experts(monkeypatch):
    """All 2^4 patterns, two tiles in the full experts, unused rows at the end; one executable for each form."""
    from jaxlab.kernels import expert_ffn as _  # noqa: F401 - the name is the function; the module is patched below

    monkeypatch.setattr("sys.modules", __import__("sys").modules)
    module = __import__("sys").modules["jaxlab.kernels.expert_ffn"]
    monkeypatch.setattr(module, "TILE", 4)
    tokens, d, f, num = 12, 5, 6, 4
    x, w = rng.normal(size=(tokens, d)).astype(np.float32), ffn_weights(num, d, f)
    c = rng.normal(size=(tokens, d)).astype(np.float32)
    tiled, dense = grads_of("xla"), grads_of("reference")
    for pattern in itertools.product((0, 1), repeat=num):
        live = [e for e in range(num) if pattern[e]]
        experts = np.array([live[i % len(live)] for i in range(20)] if live else [], int)
        plan = make_plan(experts, rng.uniform(0.1, 1, len(experts)), rng.integers(0, tokens, len(experts)), num, 24)
        (_, y), grads = tiled(x, w, plan.weight, plan, c)
        (_, y_dense), grads_dense = dense(x, w, plan.weight, plan, c)
        np.testing.assert_allclose(y, experts_oracle(x.astype(np.float64), w, plan, "swiglu"), atol=2e-5)
        np.testing.assert_allclose(y_dense, y, atol=2e-5)
        real = plan.expert < num
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), grads[:2], grads_dense[:2])
        np.testing.assert_allclose(grads[2][real], grads_dense[2][real], atol=5e-5)
        assert not np.any(grads[2][~real]), "an unused row of the plan has a gradient"
    assert tiled._cache_size() == 1


def test_experts_gradient_against_differences_in_float64():
    with jax.enable_x64(True):
        num, d, f = 3, 4, 5
        x = rng.normal(size=(6, d))
        w = {n: v.astype(np.float64) for n, v in ffn_weights(num, d, f).items()}
        plan = make_plan(np.array([0, 0, 2, 2, 2, 0]), rng.uniform(size=6), np.array([0, 1, 2, 3, 3, 5]), num)
        c = rng.normal(size=x.shape)
        scale = np.asarray(plan.weight, np.float64)
        (_, y), (dx, dw, ds) = grads_of("xla")(x, w, scale, plan, c)
        assert y.dtype == jnp.float64
        import dataclasses

        f0 = lambda x, w, s: np.sum(experts_oracle(x, w, dataclasses.replace(plan, weight=s), "swiglu") * c)
        h = 1e-6
        for name, value, grad in (
            ("x", x, dx),
            ("scale", scale, ds),
            ("up", w["up"], dw["up"]),
            ("gate", w["gate"], dw["gate"]),
            ("down", w["down"], dw["down"]),
        ):
            direction = rng.normal(size=value.shape)
            at = lambda sign: {"x": x, "scale": scale, **w, name: value + sign * h * direction}
            run = lambda v: f0(v["x"], {n: v[n] for n in w}, v["scale"])
            numeric = (run(at(1)) - run(at(-1))) / (2 * h)
            np.testing.assert_allclose(
                np.sum(np.asarray(grad) * direction), numeric, rtol=1e-6, atol=1e-8, err_msg=name
            )


def test_experts_under_vmap_equal_a_loop_also_with_shared_arguments():
    num, d, f = 3, 4, 5
    plan = make_plan(np.array([0, 0, 2, 1]), np.ones(4), np.array([0, 1, 2, 3]), num)
    xs = rng.normal(size=(2, 4, d)).astype(np.float32)
    ws = jax.tree.map(lambda *a: np.stack(a), ffn_weights(num, d, f), ffn_weights(num, d, f))
    c = np.ones((4, d), np.float32)
    run = grads_of("xla")
    one = lambda i, j: run(xs[i], jax.tree.map(lambda a: a[j], ws), plan.weight, plan, c)
    for axes in ((0, 0), (None, 0), (0, None)):
        x = xs if axes[0] == 0 else xs[0]
        w = ws if axes[1] == 0 else jax.tree.map(lambda a: a[0], ws)
        got = jax.vmap(run, in_axes=(*axes, None, None, None))(x, w, plan.weight, plan, c)
        for i in range(2):
            expected = one(i if axes[0] == 0 else 0, i if axes[1] == 0 else 0)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=1e-5), got, expected)


def test_experts_inside_shard_map(mesh8):
    from jax.sharding import PartitionSpec as P

    num, d, f = 2, 3, 4
    w = ffn_weights(num, d, f)
    x = rng.normal(size=(16, d)).astype(np.float32)
    plan = make_plan(np.array([0, 1]), np.ones(2), np.array([0, 1]), num)
    local = lambda x, w: kernels.expert_ffn(x, w, plan)
    mapped = jax.shard_map(local, mesh=mesh8, in_specs=(P("data"), P()), out_specs=P("data"))
    loss = lambda w: jnp.sum(mapped(x, w) ** 2)
    value, grad = jax.jit(jax.value_and_grad(loss))(w)
    whole = lambda w: jnp.sum(jnp.stack([local(x[i : i + 2], w) for i in range(0, 16, 2)]) ** 2)
    expected = jax.jit(jax.value_and_grad(whole))(w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), (value, grad), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_experts_other_activations_and_bfloat16(activation):
    num, d, f = 2, 4, 8
    w = ffn_weights(num, d, f, "relu")
    x = rng.normal(size=(6, d)).astype(np.float32)
    plan = make_plan(np.array([0, 1, 1]), np.ones(3), np.array([0, 1, 5]), num)
    tiled, dense = grads_of("xla", activation), grads_of("reference", activation)
    a, b = tiled(x, w, plan.weight, plan, np.ones_like(x)), dense(x, w, plan.weight, plan, np.ones_like(x))
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=2e-5), a, b)
    if activation == "relu":
        np.testing.assert_allclose(a[0][1], experts_oracle(x, w, plan, "relu"), atol=2e-5)
        half = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), (x, w))
        y = kernels.expert_ffn(*half, plan, activation="relu")
        assert y.dtype == jnp.bfloat16
        # Inputs, weights, hidden values and the result are each rounded once to 8 bits.
        scale = np.abs(experts_oracle(np.abs(x), jax.tree.map(np.abs, w), plan, "relu")).max()
        np.testing.assert_allclose(np.asarray(y, np.float32), a[0][1], atol=4 * 2**-8 * scale)


@pytest.mark.optimised
def test_memory_of_the_experts_does_not_grow_with_their_number():
    def temporary(num):
        d, f, tokens = 64, 128, 512
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        ints = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
        w = {"up": shape(num, d, f), "gate": shape(num, d, f), "down": shape(num, f, d)}
        zeros = shape(tokens, num)
        plan = RoutingPlan(ints(2 * tokens), ints(2 * tokens), shape(2 * tokens), ints(num), zeros, zeros, ints())
        run = grads_of("xla").lower(shape(tokens, d), w, shape(2 * tokens), plan, shape(tokens, d)).compile()
        return run.memory_analysis().temp_size_in_bytes

    assert temporary(16) < 1.2 * temporary(4)


def test_experts_refuse():
    plan = make_plan(np.array([0]), np.ones(1), np.array([0]), 2)
    good = ffn_weights(2, 3, 4)
    for x, w, options, message in (
        (np.ones((1, 3)), {"up": good["up"]}, {}, "weights must hold"),
        (np.ones((1, 5)), good, {}, "must have shape"),
        (np.ones((1, 3)), good, {"activation": "tanh"}, "activation='tanh'"),
        (np.ones((3,)), good, {}, "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.expert_ffn(jnp.asarray(x, jnp.float32), w, plan, **options)


# ---- attention


def attention_oracle(q, k, v, causal=False, window=None, qs=None, ks=None, bias=None, soft_cap=None):
    b, t, n, h = q.shape
    s, kv = k.shape[1], k.shape[2]
    out, lse = np.zeros(q.shape), np.full((b, n, t), -np.inf)
    for i, j, a in itertools.product(range(b), range(n), range(t)):
        if qs is not None and qs[i, a] < 0:
            continue
        head = j // (n // kv)
        place = a + s - t
        see = [
            m for m in range(s)
            if (not causal or m <= place)
            and (window is None or m > place - window)
            and (qs is None or (qs[i, a] == ks[i, m] and ks[i, m] >= 0))
        ]  # fmt: skip
        if not see:
            continue
        z = np.array([q[i, a, j] @ k[i, m, head] for m in see]) * h**-0.5
        z = soft_cap * np.tanh(z / soft_cap) if soft_cap else z
        z = z + (0 if bias is None else bias[i, j, a, see])
        e = np.exp(z - z.max())
        out[i, a, j] = (e / e.sum()) @ v[i, see, head]
        lse[i, j, a] = z.max() + np.log(e.sum())
    return out, lse


ATTENTION = [
    {},
    {"causal": True},
    {"causal": True, "window": 3},
    {"soft_cap": 2.0, "causal": True},
    {"segments": True},
    {"segments": True, "causal": True},
]


@pytest.mark.parametrize("options", ATTENTION, ids=[",".join(o) or "plain" for o in ATTENTION])
def test_attention_equals_the_loop_and_its_forms_agree(options, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["jaxlab.kernels.attention"], "CHUNK", 4)  # several chunks and a padded tail
    q = rng.normal(size=(2, 7, 4, 5)).astype(np.float32)
    k, v = (rng.normal(size=(2, 10, 2, 5)).astype(np.float32) for _ in range(2))
    qs = ks = None
    options = dict(options)
    if options.pop("segments", False):
        qs = np.array([[0, 0, 0, 1, 1, -1, -1], [0, 1, 2, 2, 2, 2, 5]], np.int32)
        ks = np.array([[0, 0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 1, 1, 2, 2, 2, 2, 2, -1]], np.int32)
    out, lse = attention_oracle(q, k, v, qs=qs, ks=ks, **options)
    if ks is not None:
        k[ks < 0], v[ks < 0], q[qs < 0] = np.nan, np.nan, np.nan
    c, e = rng.normal(size=out.shape).astype(np.float32), rng.normal(size=lse.shape).astype(np.float32)

    def form(implementation):
        def loss(q, k, v):
            o, l = kernels.attention(
                q, k, v, q_segment_ids=qs, kv_segment_ids=ks, return_lse=True, implementation=implementation, **options
            )
            return jnp.sum(o * c) + jnp.sum(jnp.where(jnp.isfinite(l), l, 0.0) * e), (o, l)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, (o, l)), grads = form("reference")
    (_, (o2, l2)), grads2 = form("xla")
    for got in (o, o2):
        np.testing.assert_allclose(got, out, atol=2e-6)
    for got in (l, l2):
        np.testing.assert_allclose(got, lse, atol=3e-6)
    for a, b in zip(grads, grads2, strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, atol=5e-6)
    if ks is not None:
        for grad in (grads, grads2):
            assert not np.any(grad[0][qs < 0]) and not np.any(grad[1][ks < 0]) and not np.any(grad[2][ks < 0])


def test_attention_with_bias_and_its_gradient_against_differences():
    with jax.enable_x64(True):
        q, k, v = (rng.normal(size=(1, 4, 2, 3)) for _ in range(3))
        bias = rng.normal(size=(1, 2, 4, 4))
        c = rng.normal(size=q.shape)
        loss = lambda q, k, v, b: jnp.sum(kernels.attention(q, k, v, bias=b, causal=True) * c)
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias)
        f = lambda q, k, v, b: np.sum(attention_oracle(q, k, v, causal=True, bias=b)[0] * c)
        np.testing.assert_allclose(value, f(q, k, v, bias), rtol=1e-10)
        args = (q, k, v, bias)
        for i in range(4):
            d = rng.normal(size=args[i].shape)
            plus, minus = ([a + s * 1e-6 * d if j == i else a for j, a in enumerate(args)] for s in (1, -1))
            np.testing.assert_allclose(np.sum(grads[i] * d), (f(*plus) - f(*minus)) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.optimised
def test_attention_memory_is_linear_in_the_length():
    def temporary(length):
        a = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v: jnp.sum(kernels.attention(q, k, v, causal=True) ** 2)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(a, a, a).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)


def test_attention_refuses():
    x = jnp.ones((1, 3, 4, 2))
    for args, options, message in (
        ((x, x, x[:, :2]), {}, "q, k, v must be"),
        ((x, x[:, :, :3], x[:, :, :3]), {}, "K dividing N"),
        ((x, x, x), {"window": 2}, "needs causal=True"),
        ((x, x, x), {"q_segment_ids": jnp.zeros((1, 3), jnp.int32)}, "given together"),
        ((x, x, x), {"soft_cap": 0.0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.attention(*args, **options)


def attend(q, k, v):
    return kernels.attention(q[None], k[None], v[None], causal=True)[0]


def weights_of(scores, *, where=None):
    chosen = kernels.top_k_routing(scores, 2, where=where, renormalize=True)
    return chosen.weights.astype(scores.dtype)


QKV = {name: Arg("activations", (6, 2, 4)) for name in "qkv"}
CASES = [
    Case(attend, QKV, wrt=("q", "k", "v"), name="attention"),
    Case(
        weights_of, {"scores": Arg("scores", (6, 4)), "where": Arg("where", (6,))}, wrt=("scores",), name="top_k_routing",
        rows={"scores": 0, "where": 0}, symmetry="equivariant",
        skip={"dtype": "router arithmetic is float32; rounding the scores to bfloat16 changes which experts are chosen"},
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
