"""The expert feed-forward against explicit loops in float64, in both forms."""

import functools
import itertools
import math
import sys

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import ops
from jaxlab._compat import tpu_interpreter
from jaxlab.kernels import _expert_kernels as kernels
from jaxlab.kernels import expert_ffn, plan_from_top_k, top_k_routing
from jaxlab.kernels._grouped_pallas import FORMS
from jaxlab.types import RoutingPlan

rng = np.random.default_rng()
T, E, D, F = 6, 4, 3, 5
ACTIVATIONS = ("swiglu", "gelu", "relu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.expert_ffn"], "_TILES", (4, 2))


def make_plan(assignments, rows=None, experts=E, tokens=T):
    """A plan of (token, expert, weight) triples; unused rows point at a token that the test poisons."""
    assignments = sorted(assignments, key=lambda a: a[1])
    rows = len(assignments) if rows is None else rows
    token, expert, weight = np.full(rows, tokens - 1, np.int32), np.full(rows, experts, np.int32), np.zeros(rows)
    for i, (t, e, w) in enumerate(assignments):
        token[i], expert[i], weight[i] = t, e, w
    counts = np.array([(expert == e).sum() for e in range(experts)], np.int32)
    zeros = np.zeros((tokens, experts), np.float32)
    return RoutingPlan(token, expert, weight.astype(np.float32), counts, zeros, zeros, np.int32(0))


def draw_weights(activation="swiglu", experts=E, size=D, hidden=F):
    names = ("gate", "up", "down") if activation == "swiglu" else ("up", "down")
    return {
        n: rng.normal(size=(experts, hidden, size) if n == "down" else (experts, size, hidden)).astype(np.float32)
        for n in names
    }


def draw_x(tokens=T, size=D):
    x = rng.normal(size=(tokens, size)).astype(np.float32)
    x[-1] = np.nan  # the last token is padding: no assignment, and unused rows point at it
    return x


def oracle(x, weights, plan, activation, row_weights=None):
    row_weights = plan.weight.astype(np.float64) if row_weights is None else row_weights
    y = np.zeros(x.shape)
    w = {name: leaf.astype(np.float64) for name, leaf in weights.items()}
    for i in range(len(plan.token)):
        t, e = int(plan.token[i]), int(plan.expert[i])
        if e >= w["up"].shape[0]:
            continue
        up = x[t].astype(np.float64) @ w["up"][e]
        if activation == "swiglu":
            gate = x[t].astype(np.float64) @ w["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * up
        elif activation == "gelu":
            hidden = np.array([u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in up])
        else:
            hidden = np.maximum(up, 0)
        y[t] += row_weights[i] * (hidden @ w["down"][e])
    return y


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def run(x, weights, plan, dy, activation="swiglu", implementation="xla"):
    def loss(x, weights, row_weights):
        moved = RoutingPlan(plan.token, plan.expert, row_weights, plan.counts, plan.scores, plan.logits, plan.dropped)
        y = expert_ffn(x, weights, moved, activation=activation, implementation=implementation)
        return (y * dy).sum(), y

    grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, plan.weight)
    return y, grads


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def random_assignments(experts=range(E), k=2, tokens=T - 1):
    """Every token but the last goes to up to k of the experts."""
    experts = list(experts)
    k = min(k, len(experts))
    return [(t, int(e), rng.uniform(0.1, 1)) for t in range(tokens) for e in rng.permutation(experts)[:k]]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_all_gradients_match_loops(activation, implementation):
    x, weights, plan = draw_x(), draw_weights(activation), make_plan(random_assignments(), rows=13)
    dy = rng.normal(size=x.shape).astype(np.float32)
    dy[-1] = 3.0
    y, (dx, dw, dg) = run(x, weights, plan, dy, activation, implementation)
    np.testing.assert_allclose(y, oracle(np.nan_to_num(x), weights, plan, activation), rtol=1e-5, atol=1e-5)
    assert y.dtype == jnp.float32 and not np.any(y[-1]) and not np.any(dx[-1]) and not np.any(dg[10:])

    clean = np.nan_to_num(x).astype(np.float64)

    def loss(x=clean, weights=weights, rows=None):
        return (oracle(x, weights, plan, activation, rows) * dy).sum()

    def differences(value, call):
        out = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.astype(np.float64)
                moved[index] += sign * 1e-6
                ends.append(call(moved))
            out[index] = (ends[0] - ends[1]) / 2e-6
        return out

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(dx, differences(clean, lambda m: loss(x=m)))
    close(dg, differences(plan.weight, lambda m: loss(rows=m)))
    for name in weights:
        some = weights[name][1]  # one expert by every entry; the others are compared with the reference below
        close(dw[name][1], differences(some, lambda m, name=name: loss(weights=put(weights, name, m))))
    if implementation == "xla":
        assert_trees_close((y, (dx, dw, dg)), run(x, weights, plan, dy, activation, "reference"), 1e-4, 1e-5)


def put(weights, name, leaf):
    moved = {n: w.astype(np.float64) for n, w in weights.items()}
    moved[name][1] = leaf
    return moved


def test_every_pattern_of_empty_experts():
    run._clear_cache()
    weights = draw_weights()
    for pattern in itertools.product([False, True], repeat=E):
        used = [e for e in range(E) if pattern[e]]
        x, plan = draw_x(), make_plan(random_assignments(used, k=3), rows=17)
        dy = rng.normal(size=x.shape).astype(np.float32)
        y, grads = run(x, weights, plan, dy)
        np.testing.assert_allclose(y, oracle(np.nan_to_num(x), weights, plan, "swiglu"), rtol=1e-4, atol=1e-5)
        assert_trees_close(grads, run(x, weights, plan, dy, implementation="reference")[1], 1e-4, 1e-5)
        for name, leaf in grads[1].items():
            for e in set(range(E)) - set(used):
                assert not np.any(leaf[e]), (name, e, pattern)
    assert run._cache_size() == 2


def test_all_tokens_in_one_expert_and_shapes_of_one():
    weights = draw_weights()
    for expert in (0, E - 1):
        x, plan = draw_x(), make_plan([(t, expert, 0.5 + t) for t in range(T - 1)], rows=7)
        y, grads = run(x, weights, plan, np.ones_like(x))
        np.testing.assert_allclose(y, oracle(np.nan_to_num(x), weights, plan, "swiglu"), rtol=1e-4, atol=1e-5)
        assert np.isfinite(grads[0]).all()
    x = rng.normal(size=(1, D)).astype(np.float32)
    plan = make_plan([(0, 2, 0.7)], tokens=1)
    np.testing.assert_allclose(expert_ffn(x, weights, plan), oracle(x, weights, plan, "swiglu"), rtol=1e-4, atol=1e-6)
    none = make_plan([], rows=0, tokens=1)
    assert expert_ffn(x, weights, none).tolist() == [[0.0] * D]
    # A token may meet the same expert twice, also within one tile.
    plan = make_plan([(0, 2, 0.7), (0, 2, 0.2), (0, 1, 1.0)], tokens=1)
    np.testing.assert_allclose(expert_ffn(x, weights, plan), oracle(x, weights, plan, "swiglu"), rtol=1e-4, atol=1e-6)


def test_default_tiles(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.expert_ffn"], "_TILES", (512, 128, 64, 32))
    tokens = 250  # 500 assignments over 4 experts: tiles of 128, 64 and 32 with tails
    x, weights = rng.normal(size=(tokens, D)).astype(np.float32), draw_weights()
    assignments = [(t, e, rng.uniform()) for t in range(tokens) for e in ((0, 3) if t % 5 else (1, 3))]
    plan = make_plan(assignments, rows=510, tokens=tokens)
    dy = rng.normal(size=x.shape).astype(np.float32)
    f = jax.jit(run.__wrapped__, static_argnames=("activation", "implementation"))
    assert_trees_close(f(x, weights, plan, dy), f(x, weights, plan, dy, implementation="reference"), 1e-4, 2e-4)


@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16(weight_dtype):
    weights = {n: jnp.asarray(w, weight_dtype) for n, w in draw_weights().items()}
    x = jnp.asarray(draw_x(), jnp.bfloat16)
    plan = make_plan(random_assignments(), rows=13)
    dy = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
    y, grads = run(x, weights, plan, dy)
    assert y.dtype == grads[0].dtype == jnp.bfloat16 and grads[2].dtype == jnp.float32
    assert all(leaf.dtype == weight_dtype for leaf in grads[1].values())
    wide = jax.tree.map(lambda a: np.asarray(a.astype(jnp.bfloat16), np.float32), (x, weights, dy))
    exact_y, exact = run(wide[0], wide[1], plan, wide[2])
    # One rounding (2^-8 relative) of the hidden layer and one of the result; in the backward one more, of the
    # cotangent. Errors of a sum are measured against its largest entry, with a factor of 2 for cancellation.
    for got, reference, roundings in [
        (y, exact_y, 2),
        *zip(*map(jax.tree.leaves, (grads, exact)), itertools.repeat(3)),
    ]:
        error = np.max(np.abs(np.asarray(got, np.float32) - np.asarray(reference)))
        assert error <= 2 * roundings * 2**-8 * np.max(np.abs(reference))


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def test_vmap_equals_the_loop_and_nothing_is_traced_twice():
    traces = []

    def f(x, weights, plan, dy):
        traces.append(None)
        return run.__wrapped__(x, weights, plan, dy)

    members = 3
    x, dy = [draw_x() for _ in range(members)], [rng.normal(size=(T, D)).astype(np.float32) for _ in range(members)]
    weights = [draw_weights() for _ in range(members)]
    plans = [make_plan(random_assignments(range(i, E)), rows=13) for i in range(members)]
    jitted = jax.jit(f)
    loop = [jitted(*args) for args in zip(x, weights, plans, dy, strict=True)]
    assert len(traces) == 1
    got = jax.jit(jax.vmap(f))(np.stack(x), stack(weights), stack(plans), np.stack(dy))
    assert_trees_close(got, stack(loop), 1e-4, 1e-6)
    # Shared weights, then shared tokens.
    got = jax.jit(jax.vmap(f, in_axes=(0, None, 0, 0)))(np.stack(x), weights[0], stack(plans), np.stack(dy))
    loop = [jitted(x[i], weights[0], plans[i], dy[i]) for i in range(members)]
    assert_trees_close(got, stack(loop), 1e-4, 1e-6)
    got = jax.jit(jax.vmap(f, in_axes=(None, 0, None, None)))(x[0], stack(weights), plans[0], dy[0])
    loop = [jitted(x[0], weights[i], plans[0], dy[0]) for i in range(members)]
    assert_trees_close(got, stack(loop), 1e-4, 1e-6)
    # The gradient of a vmapped function, by what its members share.
    total = jax.jit(
        jax.grad(lambda w: (jax.vmap(expert_ffn, in_axes=(0, None, 0))(np.stack(x), w, stack(plans))[:, :-1]).sum())
    )(weights[0])
    ones = np.ones((T, D), np.float32)
    each = [jitted(x[i], weights[0], plans[i], ones)[1][1] for i in range(members)]
    assert_trees_close(total, jax.tree.map(lambda *leaves: sum(leaves), *each), 1e-4, 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh8, check_vma):
    x, dy = (rng.normal(size=(8, T, D)).astype(np.float32) for _ in range(2))
    weights = draw_weights()
    logits = rng.normal(size=(8, T, E)).astype(np.float32)

    def loss(weights, x, logits, dy):
        plan = plan_from_top_k(top_k_routing(logits, 2), logits)
        return (expert_ffn(x, weights, plan) * dy).sum()

    def sharded(weights, x, logits, dy):
        return jax.lax.psum(loss(weights, x[0], logits[0], dy[0]), "data")

    spec = (P(), P("data"), P("data"), P("data"))
    mapped = jax.shard_map(sharded, mesh=mesh8, in_specs=spec, out_specs=P(), check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1, 2)))(weights, x, logits, dy)

    def together(weights, x, logits, dy):
        return jax.vmap(loss, in_axes=(None, 0, 0, 0))(weights, x, logits, dy).sum()

    assert_trees_close(
        got, jax.jit(jax.value_and_grad(together, argnums=(0, 1, 2)))(weights, x, logits, dy), 1e-3, 1e-4
    )


def test_vmap_inside_shard_map(mesh8):
    x, dy = (rng.normal(size=(8, 2, T, D)).astype(np.float32) for _ in range(2))
    weights = stack([draw_weights() for _ in range(16)])
    weights = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), weights)
    plans = stack([make_plan(random_assignments(tokens=T), rows=13) for _ in range(16)])
    plans = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), plans)
    each = jax.vmap(run.__wrapped__)

    def local(*args):
        return jax.tree.map(lambda leaf: leaf[None], each(*jax.tree.map(lambda leaf: leaf[0], args)))

    got = jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=P("data"), out_specs=P("data")))(x, weights, plans, dy)
    single = [jax.tree.map(lambda leaf: leaf[3, 1], tree) for tree in (x, weights, plans, dy)]
    assert_trees_close(jax.tree.map(lambda leaf: leaf[3, 1], got), run(*single), 1e-4, 1e-5)


def test_explicit_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, weights = rng.normal(size=(T, D)).astype(np.float32), draw_weights()
    logits = rng.normal(size=(T, E)).astype(np.float32)

    def f(x, weights, logits):
        return expert_ffn(x, weights, plan_from_top_k(top_k_routing(logits, 2), logits))

    with jax.set_mesh(mesh):
        got = jax.jit(f)(jax.device_put(x, P("data")), weights, jax.device_put(logits, P("data")))
    assert_trees_close(got, jax.jit(f)(x, weights, logits))


def test_temporary_memory_does_not_grow_with_the_experts():
    tokens, size, hidden = 64, 32, 48

    def bytes_of(experts, both):
        shapes = {"gate": (experts, size, hidden), "up": (experts, size, hidden), "down": (experts, hidden, size)}
        weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
        plan = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_plan([], 2 * tokens, experts, tokens)))
        f = run.__wrapped__ if both else lambda x, weights, plan, dy: expert_ffn(x, weights, plan)
        return jax.jit(f).lower(x, weights, plan, x).compile().memory_analysis().temp_size_in_bytes

    # Temporary bytes leave out arguments and results, so the gradient of the weights itself does not count.
    for both in (False, True):
        assert bytes_of(16, both) <= 1.2 * bytes_of(4, both)


@pytest.mark.parametrize("platform", sorted(FORMS))
def test_kernels_in_their_interpreter_equal_the_other_form(platform):
    """Value and all gradients, with an idle expert, an unused row, and tiles shared by experts."""
    interpret = tpu_interpreter() if platform == "tpu" else True
    options = {"tiles": (16, 16, 16), "interpret": interpret}
    product, outer = (functools.partial(form, **options) for form in FORMS[platform])
    x, weights, plan = draw_x(), draw_weights(), make_plan(random_assignments(experts=(0, 2, 3)), rows=12)
    dy = rng.normal(size=x.shape).astype(np.float32)
    kind = sys.modules["jaxlab.kernels.expert_ffn"]
    described = kind._ACTIVATIONS["swiglu"], kind._inputs("swiglu")

    @jax.jit
    def both(x, weights, plan, dy):
        args = x, weights, plan.token, plan.weight, plan.counts
        return kernels.forward(product, *described, *args), kernels.backward(product, outer, *described, *args, dy)

    y, (dx, dw, dg) = run(x, weights, plan, dy)
    got, (got_dx, got_dw, got_dg) = both(x, weights, plan, dy)
    assert_trees_close((got, got_dx, dict(got_dw), got_dg), (y, dx, dw, dg), rtol=1e-4, atol=1e-4)
    assert not np.any(got[-1]) and not np.any(got_dx[-1])


def test_errors():
    x, weights, plan = jnp.zeros((T, D)), draw_weights(), make_plan(random_assignments())
    cases = [
        (r"activation='tanh' must be one of 'swiglu', 'gelu', 'relu'", (x, weights), {"activation": "tanh"}),
        (
            r"weights of 'relu' must be \['down', 'up'\], got \['down', 'gate', 'up'\]",
            (x, weights),
            {"activation": "relu"},
        ),
        (r"x must be \[tokens, features\], got shape \(6, 3, 1\)", (x[:, :, None], weights), {}),
        (r"weights\['gate'\] has shape \(4, 3, 5\), expected \(4, 2, 5\)", (x[:, :2], weights), {}),
        (r"implementation='fast' of expert_ffn must be one of 'auto'", (x, weights), {"implementation": "fast"}),
    ]
    for message, args, keywords in cases:
        with pytest.raises(ValueError, match=message):
            expert_ffn(*args, plan, **keywords)


def test_a_named_kernel_that_cannot_run_here_raises():
    x, weights, plan = jnp.zeros((T, D)), draw_weights(), make_plan(random_assignments())
    # The error is that of JAX's lowering, which alone knows for which platform the program is.
    with pytest.raises(NotImplementedError, match="platform"):
        jax.jit(lambda x: expert_ffn(x, weights, plan, implementation="pallas"))(x)


def through_experts(x, scores, gate, up, down, *, where=None):
    plan = plan_from_top_k(top_k_routing(scores.astype(jnp.float32), 2, where=where), scores.astype(jnp.float32))
    return expert_ffn(ops.zero_where_false(x, where), {"gate": gate, "up": up, "down": down}, plan)


WEIGHTS = {"gate": Arg("activations", (4, 3, 5)), "up": Arg("activations", (4, 3, 5)),
           "down": Arg("activations", (4, 5, 3))}  # fmt: skip
CASES = [
    Case(
        through_experts,
        {
            "x": Arg("activations", (6, 3)),
            "scores": Arg("probabilities", (6, 4)),
            **WEIGHTS,
            "where": Arg("where", (6,)),
        },
        wrt=("x", "gate", "up", "down"),
        rows={"x": 0, "scores": 0, "where": 0},
        symmetry="equivariant",
        covers=("kernels.expert_ffn",),
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
