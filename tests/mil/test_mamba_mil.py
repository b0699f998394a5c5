"""MambaMIL: the block and the whole model against step-by-step loops in both layouts, orders, survival losses."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil

rng = np.random.default_rng(0)
B, N, D, R = 4, 8, 4, 3
SIZES = {"rate": R, "states": 2, "taps": 3}
KEEP = np.array([[1] * 7 + [0], [0, 1, 1, 0, 1, 1, 0, 1], [0] * 8, [0, 0, 1, 0, 0, 0, 0, 0]], bool)
X = np.where(KEEP[..., None], rng.normal(size=(B, N, D)), np.nan).astype(np.float32)
# Bags shuffled into each other, with padding between; each keeps its own order.
ORDER = np.argsort(np.where(KEEP, rng.random((B, N)).cumsum(1), rng.random((B, N))).reshape(-1))
IDS = np.where(KEEP, np.arange(B)[:, None], -1).reshape(-1)[ORDER].astype(np.int32)
LIST = {"segment_ids": IDS, "num_segments": B}


def drawn(layer, size):
    """Parameters of the right shapes, away from their start, where biases are 0."""
    shapes = jax.eval_shape(lambda key: layer.init(key, size), jax.random.key(0))
    return jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), shapes)


def silu(v):
    return v / (1 + np.exp(-v))


def linear(p, x):
    return x @ p["w"] + p.get("b", 0.0)


def layer_norm(p, u):
    u = u - u.mean(-1, keepdims=True)
    return u / np.sqrt((u * u).mean(-1, keepdims=True) + 1e-5) * p["gain"] + p["bias"]


def branch_oracle(p, x, alive):
    taps, decay = len(p["conv"]["w"]), -np.exp(p["log_decay"])
    rank, states = len(p["steps"]["w"]), decay.shape[1]
    state, y = np.zeros_like(decay), np.zeros_like(x)
    for t in range(len(x)):
        total = p["conv"]["b"].copy()
        for j in range(taps):
            if t - j >= 0:
                total += p["conv"]["w"][taps - 1 - j] * x[t - j]
        u = silu(total)
        both = u @ p["in"]["w"]
        low, into, out = both[:rank], both[rank : rank + states], both[rank + states :]
        delta = np.log1p(np.exp(linear(p["steps"], low)))
        if alive[t]:
            state = np.exp(delta[:, None] * decay) * state + (delta * u)[:, None] * into[None]
            y[t] = state @ out + p["skip"] * u
    return y


def block_oracle(p, u, kind, masked, rate=R):
    n = len(u)
    if not n:
        return u
    x, gate = np.split(u @ p["in"]["w"], 2, axis=1)
    first, *others = (jax.tree.map(lambda v, i=i: v[i], p["branches"]) for i in range(1 if kind == "mamba" else 2))
    y = branch_oracle(first, x, np.ones(n, bool))
    if kind == "bi":
        y = y + branch_oracle(others[0], x[::-1], np.ones(n, bool))[::-1]
    if kind == "sr":
        columns = -(-n // rate)
        order = [k * rate + r for r in range(rate) for k in range(columns)]
        rows = np.array([x[i] if i < n else np.zeros(x.shape[1]) for i in order])
        out = branch_oracle(others[0], rows, [i < n or not masked for i in order])
        for place, i in enumerate(order):
            if i < n:
                y[i] += out[place]
    return (y * silu(gate)) @ p["out"]["w"]


@pytest.mark.parametrize("kind, masked", [("sr", False), ("sr", True), ("bi", False)])
def test_block_equals_the_loop_in_both_layouts(kind, masked):
    block = mil.sr_mamba(kind=kind, mask_padding=masked, **SIZES)
    params = drawn(block, D)
    padded, listed = jax.jit(
        lambda p: (block.apply(p, X, where=KEEP), block.apply(p, X.reshape(-1, D)[ORDER], **LIST))
    )(params)
    wide = jax.tree.map(np.float64, params)
    for b in range(B):
        expected = block_oracle(wide, X[b][KEEP[b]].astype(np.float64), kind, masked)
        np.testing.assert_allclose(padded[b][KEEP[b]], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(listed[b == IDS], expected, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(padded)[~KEEP]) and not np.any(np.asarray(listed)[IDS < 0])


def test_a_rate_of_one_with_equal_branches_doubles_one_branch_that_looks_back():
    one, two = (mil.sr_mamba(kind=kind, **{**SIZES, "rate": 1}) for kind in ("mamba", "sr"))
    params = drawn(one, D)
    moved = X[:1, :7].copy()
    moved[0, 4] += 1

    def run(p, x, moved):
        twice = jax.tree.map(lambda v: jnp.concatenate([v, v]), p["branches"])
        return one.apply(p, x), two.apply({**p, "branches": twice}, x), one.apply(p, moved)

    plain, both, other = (np.asarray(a)[0] for a in jax.jit(run)(params, X[:1, :7], moved))
    np.testing.assert_allclose(both, 2 * plain, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other[:4], plain[:4], atol=1e-6)
    assert np.all(np.abs(other[4:] - plain[4:]).max(1) > 1e-6)


MODEL = mil.mamba_mil(2, features=D, layers=1, hidden=3, dropout=0.5, **SIZES)
PARAMS = drawn(MODEL, D)


def model_oracle(p, x):
    if not len(x):
        return p["head"]["b"], np.zeros(0)
    h = np.maximum(linear(p["project"], x), 0)
    layer = p["layer_0"]
    h = h + block_oracle(layer["block"], layer_norm(layer["norm"], h), "sr", False)
    h = layer_norm(p["norm"], h)
    s = linear(p["score"], np.tanh(linear(p["hidden"], h)))[:, 0]
    a = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    return linear(p["head"], a @ h), a


def test_model_equals_the_loop_and_both_layouts_agree_in_value_and_gradient():
    def both(params, x):
        def loss(params, x, **layout):
            out = MODEL.apply(params, x, **layout)
            return jnp.sum(jnp.sin(out["logits"])), out

        form = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return form(params, x, where=KEEP), form(params, x.reshape(-1, D)[ORDER], **LIST)

    ((_, padded), (grads, of_x)), ((_, listed), (listed_grads, of_list)) = jax.tree.map(
        np.asarray, jax.jit(both)(PARAMS, X)
    )
    wide = jax.tree.map(np.float64, PARAMS)
    for b in range(B):
        logits, attention = model_oracle(wide, X[b][KEEP[b]].astype(np.float64))
        for out, own in ((padded, (b, KEEP[b])), (listed, (b == IDS,))):
            np.testing.assert_allclose(out["logits"][b], logits, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(out["attention"][own], attention, rtol=1e-3, atol=1e-6)
    assert not padded["attention"][~KEEP].any() and not of_x[~KEEP].any() and of_x[0, 0].any()
    np.testing.assert_allclose(of_list, of_x.reshape(-1, D)[ORDER], rtol=1e-3, atol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, listed_grads)
    with pytest.raises(ValueError, match="dropout in training needs a key"):
        MODEL.apply(PARAMS, X, train=True)


def test_reordering():
    x = rng.normal(size=(2, 7, 3)).astype(np.float32)

    def run(x):
        there = {rate: mil.reorder(x, rate) for rate in (1, 3, 7, 10)}
        return there, {rate: mil.inverse_reorder(y, rate, 7) for rate, y in there.items()}

    there, back = jax.jit(run)(x)
    for y in back.values():
        np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(there[1], x)
    zero = np.zeros((2, 3))
    expected = [zero if i is None else x[:, i] for i in (0, 3, 6, 1, 4, None, 2, 5, None)]
    np.testing.assert_array_equal(there[3], np.stack(expected, 1))


def test_survival_equals_the_loop():
    z, y, censored = rng.normal(size=(6, 4)), np.array([0, 1, 3, 2, 3, -1]), np.array([0, 1, 0, 1, 1, 0])
    hazards, alive = jax.jit(mil.survival_outputs)(jnp.float32(z))
    sigmoid = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(hazards, sigmoid, rtol=1e-5)
    survival = np.array([[np.prod(1 - row[: k + 1]) for k in range(4)] for row in sigmoid])
    np.testing.assert_allclose(alive, survival, rtol=1e-5)
    terms = []
    for b in range(5):
        before = survival[b, y[b] - 1] if y[b] else 1.0
        event = -np.log(before) - np.log(sigmoid[b, y[b]])
        terms.append(-0.6 * np.log(survival[b, y[b]]) if censored[b] else event)
    loss = jax.jit(lambda z: mil.nll_survival_loss(z, y, censored, alpha=0.4, reduction="none"))
    np.testing.assert_allclose(loss(jnp.float32(z)), [*terms, 0.0], rtol=1e-5)


def test_both_initialisations():
    size = 32

    def run(key):
        return [mil.sr_mamba(kind="mamba", init=name).init(key, size) for name in ("official", "mamba")]

    official, mamba = jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))
    for params in (official, mamba):
        np.testing.assert_allclose(np.exp(params["branches"]["log_decay"][0, 3]), np.arange(1, 17), rtol=1e-6)
        assert abs(params["in"]["w"].std() / (2 / (size + 4 * size)) ** 0.5 - 1) < 0.1
        conv = params["branches"]["conv"]
        assert conv["w"].shape == (1, 4, 64) and conv["b"].shape == (1, 64)
        assert all(0.4 < np.abs(v).max() <= 0.5 for v in conv.values())
    assert not official["branches"]["steps"]["b"].any()
    steps = np.log1p(np.exp(mamba["branches"]["steps"]["b"]))
    assert steps.min() > 0.9e-3 and steps.max() < 0.11 and steps.std() > 0.01
    assert np.abs(mamba["branches"]["steps"]["w"]).max() <= 2**-0.5


def test_refuses():
    with pytest.raises(ValueError, match="kind='tri' must be"):
        mil.sr_mamba(kind="tri")
    with pytest.raises(ValueError, match="init='zero' must be"):
        mil.sr_mamba(init="zero")
    with pytest.raises(ValueError, match="rate=0 must be"):
        mil.mamba_mil(2, rate=0)
    with pytest.raises(ValueError, match="rate=0 must be"):
        mil.reorder(jnp.ones((3, 2)), 0)
    with pytest.raises(ValueError, match=r"y must be \[..., 9, C\]"):
        mil.inverse_reorder(jnp.ones((8, 2)), 3, 7)
    with pytest.raises(ValueError, match=r"logits must be \[B, K\]"):
        mil.survival_outputs(jnp.ones(3))
    with pytest.raises(ValueError, match="alpha=2"):
        mil.nll_survival_loss(jnp.ones((2, 3)), jnp.zeros(2, int), jnp.zeros(2, int), alpha=2)
    with pytest.raises(ValueError, match="logits, labels and censored"):
        mil.nll_survival_loss(jnp.ones((2, 3)), jnp.zeros(2, int), jnp.zeros(3, int))


def model_case(x, where):
    return MODEL.apply(PARAMS, x, where=where)


CASES = [
    Case(model_case, {"x": Arg("embeddings", (2, 5, D)), "where": Arg("where", (2, 5))}, wrt=("x",), helper=True,
         name="mamba_mil", covers=("mil.mamba_mil", "mil.sr_mamba"), bfloat16_tolerance=0.3),
    Case(mil.nll_survival_loss, {"logits": Arg("scores", (8, 3)), "labels": Arg("labels", (8,)),
         "censored": Arg("labels", (8,), high=2), "where": Arg("where", (8,))}, static={"alpha": 0.3},
         wrt=("logits",), rows={"logits": 0, "labels": 0, "censored": 0, "where": 0}, symmetry="invariant"),
    Case(mil.survival_outputs, {"logits": Arg("scores", (3, 4))}, wrt=("logits",), helper=True),
    Case(lambda x: mil.inverse_reorder(mil.reorder(x, 3), 3, 7), {"x": Arg("embeddings", (2, 7, 3))}, wrt=("x",),
         helper=True, name="reorder", covers=("mil.reorder", "mil.inverse_reorder")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
