"""Hybrids, their loss and the side-by-side training of modules against loops."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import moe
from jaxlab.ops.layers import dense
from jaxlab.types import Layer

rng = np.random.default_rng(0)
N, D, C = 9, 4, 3
MATRICES = [np.float32(rng.normal(size=s)) for s in ((D, D), (D, D), (D, C))]
OTHERS = [np.float32(rng.normal(size=s)) for s in ((D, D), (D, D), (D, C))]
bound = lambda matrices: [lambda h, w=w: jnp.tanh(h @ w) for w in matrices]
META, TEACHER = bound(MATRICES), bound(OTHERS)


def loss_oracle(z, t, y, alpha, tau, kind, numel):
    log = lambda a: a - np.log(np.exp(a).sum(1, keepdims=True))
    known = y >= 0
    cross = -log(z)[known, y[known]].mean() if known.any() else 0.0
    if kind == "hard":
        distilled = -log(z)[np.arange(len(z)), t.argmax(1)].mean()
    else:
        p = np.exp(log(t / tau))
        distilled = tau**2 * np.sum(p * (log(t / tau) - log(z / tau))) / (z.size if numel else len(z))
    return (1 - alpha) * cross + alpha * distilled


@pytest.mark.parametrize("kind, normalize", [("soft", "numel"), ("soft", "batch"), ("hard", "numel")])
def test_the_loss_is_the_official_formula(kind, normalize):
    z, t, y = rng.normal(size=(N, C)), 3 * rng.normal(size=(N, C)), rng.integers(-1, C, N)
    where = np.arange(N) < 7
    options = {"alpha": 0.3, "temperature": 2.0, "kind": kind, "normalize": normalize}
    loss = jax.jit(lambda z, t: moe.m2mkd_loss(z, t, y, where=where, **options))
    dirty = [np.where(where[:, None], a, np.nan).astype(np.float32) for a in (z, t)]
    expected = loss_oracle(z[:7], t[:7], y[:7], 0.3, 2.0, kind, normalize == "numel")
    np.testing.assert_allclose(loss(*dirty), expected, rtol=1e-5)


def test_hybrids_of_meta_modules_are_the_meta_network():
    x = rng.normal(size=(N, D)).astype(np.float32)
    whole = x
    for w in MATRICES:
        whole = np.tanh(whole @ w)

    def run(x):
        same = [moe.hybrid_forward(META, i, META[i], x)[0] for i in range(3)]
        scale = lambda a: jnp.sum(moe.hybrid_forward(META, 1, lambda h: TEACHER[1](a * h), x)[0] ** 2)
        before = jax.grad(lambda x: jnp.sum(moe.hybrid_forward(META, 1, TEACHER[1], x)[0]))(x)
        return same, jax.grad(scale)(1.0), before

    same, through, before = jax.jit(run)(x)
    for z in same:
        np.testing.assert_allclose(z, whole, rtol=1e-4, atol=1e-5)
    assert through != 0 and not np.any(before), "gradient must reach the module and stop before it"


def matrix(size):
    def apply(p, h):
        return jnp.tanh(h @ p["w"])

    return Layer(lambda key, d: {"w": jax.random.normal(key, (d, size)) * d**-0.5}, apply)


def test_modules_learn_apart_and_a_copied_teacher_is_at_rest():
    """One step equals two steps of modules alone; with the teacher's weights the soft loss is 0 and nothing moves."""
    x, y = rng.normal(size=(N, D)).astype(np.float32), rng.integers(0, C, N)
    students, meta, teacher = [matrix(D), matrix(C)], META[1:], TEACHER[1:]
    learner = moe.m2mkd(students, meta, teacher, optax.sgd(0.1), widths=[D] * 2)
    batch = {"x": x, "y": y}

    def run(key):
        state = learner.init(key, batch)
        after, metrics = learner.update(state, batch, key)
        return state.params, after.params, metrics["loss"], learner.predict(after, batch)["logits"]

    before, after, loss, z = jax.jit(run)(jax.random.key(0))
    expected = x
    for i in range(2):
        expected = np.tanh(expected @ after[f"module_{i}"]["module"]["w"])
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)

    def alone(w, i):
        hybrid = lambda module: moe.hybrid_forward(meta, i, module, x)[0]
        return moe.m2mkd_loss(hybrid(lambda h: jnp.tanh(h @ w)), hybrid(teacher[i]), y)

    values = jax.jit(
        lambda p: [jax.value_and_grad(lambda w, i=i: alone(w, i))(p[f"module_{i}"]["module"]["w"]) for i in range(2)]
    )(before)
    for i, (value, grad) in enumerate(values):
        w = before[f"module_{i}"]["module"]["w"]
        np.testing.assert_allclose(after[f"module_{i}"]["module"]["w"], w - 0.1 * grad, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(loss[i], value, rtol=1e-5)
    still = moe.m2mkd(students, meta, teacher, optax.sgd(0.1), widths=[D] * 2, alpha=1.0)
    copied = {f"module_{i}": {"module": {"w": w}} for i, w in enumerate(OTHERS[1:])}
    state = jax.eval_shape(lambda key: still.init(key, batch), jax.random.key(0))
    state = type(state)(copied, {}, jax.tree.map(lambda a: np.zeros(a.shape), state.opt_state), np.int32(0))
    state, metrics = jax.jit(still.update)(state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], 0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, copied)


def test_mixtures_and_stitches_fit_in():
    mixture = moe.moe_layer(moe.top_k_router(2, 1), moe.layer_experts(2, matrix(6)))
    students = [mixture, matrix(C)]
    stitches = [(dense(6), dense(D)), (None, None)]
    learner = moe.m2mkd(
        students, [META[0], META[2]], [TEACHER[0], TEACHER[2]], optax.adam(1e-2), widths=[6, D],
        stitches=stitches, meta_widths=[D, D], balance=10.0,
    )  # fmt: skip
    batch = {"x": rng.normal(size=(N, D)).astype(np.float32), "y": rng.integers(0, C, N)}
    state, metrics = jax.jit(lambda key: learner.update(learner.init(key, batch), batch, key))(jax.random.key(0))
    assert (
        set(state.params["module_0"]) == {"module", "pre", "post"} and metrics["loss"][0] > 5
    )  # 10 at least, at balance
    modules = moe.assemble(state.params)
    assert set(modules[0]) == {"router", "experts"} and moe.assemble(state.params, keep_stitches=True)[1].keys() == {
        "module"
    }


def test_refuses():
    ones = jnp.ones((2, 3))
    two = [matrix(2), matrix(2)]
    for make, match in (
        (lambda: moe.m2mkd([], [], [], optax.sgd(1), widths=[]), "must have one length"),
        (lambda: moe.m2mkd(two, META[:2], TEACHER, optax.sgd(1), widths=[2, 2]), "must have one length, got 2, 2, 3"),
        (lambda: moe.m2mkd(two, META[:2], META[:2], optax.sgd(1), widths=[2, 2], stitches=[(dense(2), None)] * 2),
         "meta_widths must have 2"),
        (lambda: moe.m2mkd(two, META[:2], META[:2], optax.sgd(1), widths=[2, 2], alpha=2.0), "alpha=2.0"),
        (lambda: moe.hybrid_forward(META, 3, META[0], ones), "index=3"),
        (lambda: moe.m2mkd_loss(ones, ones[:1], jnp.zeros(2, int)), "logits and teacher_logits must be"),
        (lambda: moe.m2mkd_loss(ones, ones, jnp.zeros(2, int), kind="warm"), "kind='warm'"),
        (lambda: moe.split_stages("abc", [1, 1]), "add up to the 3 layers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            make()


def m2mkd_loss(logits, teacher_logits, labels, where, axis_name=None):
    return moe.m2mkd_loss(logits, teacher_logits, labels, where=where, axis_name=axis_name)


def learn(x, y):
    learner = moe.m2mkd([matrix(C)], META[2:], TEACHER[2:], optax.sgd(0.1), widths=[D])
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = learner.init(jax.random.key(0), {"x": x, "y": y})
    state = type(state)(
        {"module_0": {"module": {"w": jnp.asarray(MATRICES[2], dtype)}}}, {}, state.opt_state, state.step
    )
    state, metrics = learner.update(state, {"x": x.astype(dtype), "y": y}, jax.random.key(0))
    return moe.assemble(state.params)[0]["w"].astype(x.dtype), jnp.sum(metrics["loss"]).astype(x.dtype)


def stages(x):
    return np.stack(moe.split_stages(list(x), [1, 3])[1])


LOGITS = Arg("scores", (6, C))
CASES = [
    Case(m2mkd_loss, {"logits": LOGITS, "teacher_logits": LOGITS, "labels": Arg("labels", (6,)),
                      "where": Arg("where", (6,))}, wrt=("logits",), frozen=("teacher_logits",),
         rows=dict.fromkeys(("logits", "teacher_logits", "labels", "where"), 0), symmetry="invariant",
         covers=("moe.m2mkd_loss",)),
    Case(learn, {"x": Arg("activations", (6, D)), "y": Arg("labels", (6,))}, helper=True,
         reason="a step of training", covers=("moe.m2mkd", "moe.hybrid_forward", "moe.assemble")),
    Case(stages, {"x": Arg("activations", (4, 2))}, host=True, covers=("moe.split_stages",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
