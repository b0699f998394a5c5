"""Counter-current learning against loops in float64: both networks, their losses, and whose gradient goes where."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mutual

rng = np.random.default_rng(0)
N, SIZES, C = 6, (5, 4, 4), 3  # two hidden layers
DEPTH = 3
X = rng.normal(size=(N, 5))
Y = np.array([0, 1, 2, 0, -1, 1], np.int32)
WHERE = np.arange(N) != 5
BATCH = {"x": np.float32(np.where(WHERE[:, None], X, np.nan)), "y": Y, "where": WHERE}
LABELLED = [0, 1, 2, 3]
NET = mutual.counter_current_net([4, 4], C)
PARAMS = {
    "forward": {f"dense_{i}": {"w": rng.normal(size=s)} for i, s in enumerate(((5, 4), (4, 4), (4, 3)))},
    "feedback": {f"dense_{i}": {"w": rng.normal(size=s)} for i, s in enumerate(((4, 5), (4, 4), (3, 4)))},
}
single = lambda tree: jax.tree.map(np.float32, tree)
elu = lambda a: np.where(a > 0, a, np.exp(np.minimum(a, 0)) - 1)
slope = lambda a: np.where(a > 0, 1.0, np.exp(np.minimum(a, 0)))


def pass_up(params, x):
    """Returns a_0 .. a_{L-1}, logits, and what stands before each activation."""
    a, before = [x], [None]
    for i in range(DEPTH):
        before.append(a[-1] @ params["forward"][f"dense_{i}"]["w"])
        a.append(elu(before[-1]) if i < DEPTH - 1 else before[-1])
    return a, before


def pass_down(params, targets):
    c, before = [targets], []
    for i in reversed(range(DEPTH)):
        before.insert(0, c[0] @ params["feedback"][f"dense_{i}"]["w"])
        c.insert(0, elu(before[0]) if i else before[0])
    return c, before


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def local_losses_and_grads(params, x, y, scale=0.5, silent=()):
    """Every level's loss for the rows of x (all labelled), and each weight's gradient, layer by layer."""
    (a, up), (c, down) = pass_up(params, x), pass_down(params, np.eye(C))
    one_hot = np.eye(C)[y]
    mute = np.ones((len(x), 1))
    mute[list(silent)] = 0
    losses, grads = [], {"forward": {}, "feedback": {}}
    for level in range(DEPTH):
        rows = a[level] * mute
        constant = 256 * scale / a[level].shape[1] / (len(x) * C)
        gap = rows @ c[level].T - one_hot
        losses.append(constant * np.sum(gap**2))
        if level:
            back = 2 * constant * gap @ c[level] * mute * slope(up[level])
            grads["forward"][f"dense_{level - 1}"] = {"w": a[level - 1].T @ back}
        back = 2 * constant * gap.T @ rows * (slope(down[level]) if level else 1.0)
        grads["feedback"][f"dense_{level}"] = {"w": c[level + 1].T @ back}
    p = softmax(a[-1])
    losses.append(-np.mean(np.log(p[np.arange(len(x)), y])))
    grads["forward"][f"dense_{DEPTH - 1}"] = {"w": a[-2].T @ (p - one_hot) / len(x)}
    return losses, grads


def error_grads(params, x, y, carried):
    """Gradients of the cross entropy whose error goes down by the weights `carried`."""
    a, before = pass_up(params, x)
    error, grads = (softmax(a[-1]) - np.eye(C)[y]) / len(x), {}
    for i in reversed(range(DEPTH)):
        grads[f"dense_{i}"] = {"w": a[i].T @ error}
        if i:
            error = error @ carried[i] * slope(before[i])
    return grads


def test_both_networks_equal_the_products():
    net = mutual.counter_current_net([4, 4], C)
    drawn, outputs = jax.jit(lambda key, p, x: (net.init(key, 5), net.apply(p, x, jnp.eye(C))))(
        jax.random.key(0), single(PARAMS), np.float32(X)
    )
    for got, expected in zip(outputs["activations"], pass_up(PARAMS, X)[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    for got, expected in zip(outputs["signals"], pass_down(PARAMS, np.eye(C))[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, PARAMS)
    for leaf in jax.tree.leaves(drawn):
        reach = np.abs(leaf).max() * np.sqrt(leaf.shape[0])
        assert 0.7 < reach <= 1
    images = mutual.counter_current_net([3, 2, 3], 5, autoencoder=True)
    small = jax.tree.map(lambda a: np.abs(a).max() < 0.01, jax.jit(images.init, static_argnums=1)(jax.random.key(0), 5))
    assert [small["forward"][f"dense_{i}"]["w"] for i in range(4)] == [False, False, True, True]
    assert [small["feedback"][f"dense_{i}"]["w"] for i in range(4)] == [True, True, False, False]


def test_every_weight_learns_from_its_own_level_and_errors_go_where_they_should():
    x, y = np.float32(X[LABELLED]), Y[LABELLED]

    def levels(params, gradient):
        net = mutual.counter_current_net([4, 4], C, gradient=gradient)
        return mutual.counter_current_loss(net.apply(params, x, jnp.eye(C)), jnp.asarray(y))[1]

    def run(params):
        top = [jax.grad(lambda p, g=g: levels(p, g)[-1])(params) for g in ("backprop", "alignment")]
        return levels(params, "local"), jax.jacrev(lambda p: levels(p, "local"))(params), top

    got, jacobian, (backprop, alignment) = jax.jit(run)(single(PARAMS))
    losses, grads = local_losses_and_grads(PARAMS, X[LABELLED], y)
    np.testing.assert_allclose(got, losses, rtol=1e-4)
    for way, own in (("forward", lambda i: i + 1), ("feedback", lambda i: i)):
        for i in range(DEPTH):
            rows = np.asarray(jacobian[way][f"dense_{i}"]["w"])
            np.testing.assert_allclose(rows[own(i)], grads[way][f"dense_{i}"]["w"], rtol=2e-4, atol=1e-4)
            assert not np.any(np.delete(rows, own(i), axis=0)), f"a gradient crosses a layer: {way} {i}"
    up, down = PARAMS["forward"], PARAMS["feedback"]
    for got, carried in ((backprop, [up[f"dense_{i}"]["w"].T for i in range(3)]),
                         (alignment, [down[f"dense_{i}"]["w"] for i in range(3)])):  # fmt: skip
        expected = error_grads(PARAMS, X[LABELLED], y, carried)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), got["forward"], expected)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(got["feedback"]))


def test_one_step_clips_each_network_and_leaves_out_who_knows():
    """Also: NaN under the mask and an unlabelled row change nothing."""
    grown = jax.tree.map(lambda a: a * 0.5, PARAMS)
    sure = softmax(pass_up(grown, X[LABELLED])[0][-1])[np.arange(4), Y[LABELLED]]
    confident = 1 - np.sort(sure)[-2:].mean()  # between the two surest rows
    silent = np.flatnonzero(sure > 1 - confident)
    assert len(silent) == 1
    for options, quiet in (({}, ()), ({"confident": float(confident)}, silent)):
        learner = mutual.counter_current(NET, mutual.counter_current_sgd(0.5, max_norm=2.0), num_classes=C, **options)
        state = jax.jit(learner.init)(jax.random.key(0), BATCH)
        state = state.__class__(single(grown), {}, state.opt_state, state.step)
        new, metrics = jax.jit(learner.update)(state, BATCH, None)
        losses, grads = local_losses_and_grads(grown, X[LABELLED], Y[LABELLED], silent=quiet)
        np.testing.assert_allclose([*metrics["levels"], metrics["top"]], losses, rtol=1e-4)
        for way in ("forward", "feedback"):
            norm = np.sqrt(sum(np.sum(g["w"] ** 2) for g in grads[way].values()))
            assert norm > 2
            for name, g in grads[way].items():
                expected = grown[way][name]["w"] - 0.5 * g["w"] * 2 / norm
                np.testing.assert_allclose(new.params[way][name]["w"], expected, rtol=1e-3, atol=2e-5)


def test_centralised_gradients_have_no_mean_over_a_units_inputs():
    tx, g = mutual.counter_current_sgd(centralize=True, max_norm=99.0), rng.normal(size=(4, 3))
    updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))({"forward": np.float32(g), "feedback": np.float32(g)})
    for way in updates:
        np.testing.assert_allclose(updates[way], -(g - g.mean(axis=0)), atol=1e-6)


def test_levels_equal_the_loops():
    a, c, same = rng.normal(size=(N, 4)), rng.normal(size=(C, 4)), rng.normal(size=(N, 4))
    dirty = np.float32(np.where(WHERE[:, None], a, np.nan))
    norm = np.linalg.norm

    @jax.jit
    def run(a, c, same):
        level = lambda kind, s, y: [
            mutual.counter_current_level_loss(
                a, s, y, kind=kind, scale=0.3, decorrelation=0.2, where=WHERE, reduction=reduction
            )
            for reduction in ("none", "mean")
        ]
        agree = mutual.counter_current_alignment(a, c, jnp.asarray(Y), where=WHERE)
        return level("product", c, Y), level("cosine", c, Y), level("squared", same, None), agree

    product, cosine, squared, agree = run(dirty, np.float32(c), np.float32(same))
    cos = lambda u, v: u @ v / norm(u) / norm(v)
    rows = {"product": np.zeros(N), "cosine": np.zeros(N), "squared": np.zeros(N)}
    for n in LABELLED:
        for k in range(C):
            rows["product"][n] += 256 * 0.3 / 4 * (a[n] @ c[k] - (Y[n] == k)) ** 2 / C
            rows["cosine"][n] += 0.3 * (cos(a[n], c[k]) - (Y[n] == k)) ** 2 / C
            rows["cosine"][n] += 0.2 * sum((cos(c[k], c[j]) - (j == k)) ** 2 for j in range(C)) / C**2
        rows["cosine"][n] += 0.2 * np.mean([(cos(a[n], a[m]) - (n == m)) ** 2 for m in LABELLED])
    for n in range(5):
        rows["squared"][n] = 0.3 * np.mean((a[n] - same[n]) ** 2)
    for (each, mean), name, count in ((product, "product", 4), (cosine, "cosine", 4), (squared, "squared", 5)):
        np.testing.assert_allclose(each, rows[name], rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(mean, rows[name].sum() / count, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(agree, np.mean([cos(a[n], c[Y[n]]) for n in LABELLED]), rtol=1e-5)


def test_an_autoencoder_learns_its_images():
    net = mutual.counter_current_net([4, 4], 5, autoencoder=True)
    learner = mutual.counter_current(net, mutual.counter_current_sgd(), num_classes=None)
    state = jax.jit(learner.init)(jax.random.key(0), BATCH)
    x, params = X[:5], jax.tree.map(np.float64, state.params)
    _, metrics = jax.jit(learner.update)(state, BATCH, None)
    expected = [0.5 * np.mean((a - c) ** 2)
                for a, c in zip(pass_up(params, x)[0], pass_down(params, x)[0], strict=True)]  # fmt: skip
    np.testing.assert_allclose([*metrics["levels"], metrics["top"]], expected, rtol=1e-4)


def test_refuses():
    a, c, y = np.ones((3, 4), np.float32), np.ones((2, 4), np.float32), np.zeros(3, int)
    level = mutual.counter_current_level_loss
    with pytest.raises(ValueError, match="kind='dot'"):
        level(a, c, y, kind="dot")
    with pytest.raises(ValueError, match="activations and signals must be"):
        level(a, c[:, :3], y)
    with pytest.raises(ValueError, match="kind='product' needs labels"):
        level(a, c)
    with pytest.raises(ValueError, match="kind='squared' takes no labels"):
        level(a, c, y, kind="squared")
    with pytest.raises(ValueError, match="signals has 2 rows, expected 3"):
        level(a, c, kind="squared")
    with pytest.raises(ValueError, match="labels has shape"):
        level(a, c, y[:2])
    with pytest.raises(ValueError, match="where has shape"):
        level(a, c, y, where=np.ones(2, bool))
    with pytest.raises(ValueError, match="labels has shape"):
        mutual.counter_current_alignment(a, c, y[:2])
    with pytest.raises(ValueError, match="activations and signals"):
        mutual.counter_current_alignment(a, c[:, :3], y)
    with pytest.raises(ValueError, match="gradient='none'"):
        mutual.counter_current_net([3], 2, gradient="none")
    with pytest.raises(ValueError, match=r"hidden=\[0\]"):
        mutual.counter_current_net([0], 2)
    with pytest.raises(ValueError, match=r"targets has shape \(2, 4\), expected \[M, 3\]"):
        jax.eval_shape(lambda p: NET.apply(p, X, c), PARAMS)
    with pytest.raises(ValueError, match=r"confident=0\.1"):
        mutual.counter_current(NET, mutual.counter_current_sgd(), num_classes=None, confident=0.1)
    with pytest.raises(ValueError, match="max_norm=0"):
        mutual.counter_current_sgd(max_norm=0)


cast = lambda tree, dtype: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def net_case(x):
    return NET.apply(cast(PARAMS, x.dtype), x, jnp.eye(C, dtype=x.dtype))


@jax.jit
def one_step(x, y, where):
    """The loss of a step, which holds the levels' sum."""
    learner = mutual.counter_current(NET, mutual.counter_current_sgd(), num_classes=C)
    state = jax.eval_shape(learner.init, jax.random.key(0), {"x": x})
    state = state.__class__(cast(PARAMS, x.dtype), {}, jax.tree.map(jnp.zeros_like, state.opt_state), 0)
    return learner.update(state, {"x": x, "y": y, "where": where}, None)[1]["loss"]


def step_of_sgd(x):
    tx, grads = mutual.counter_current_sgd(0.5), {"forward": x, "feedback": 2 * x}
    return tx.update(grads, tx.init(grads))[0]


ROWS = {"labels": Arg("labels", (6,)), "where": Arg("where", (6,))}
CASES = [
    Case(
        mutual.counter_current_level_loss,
        {"activations": Arg("embeddings", (6, 4)), "signals": Arg("embeddings", (3, 4)), **ROWS},
        wrt=("activations", "signals"),
        rows={"activations": 0, "labels": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        net_case,
        {"x": Arg("activations", (6, 5))},
        wrt=("x",),
        rows={"x": 0},
        helper=True,
        name="counter_current_net",
        covers=("mutual.counter_current_net",),
    ),
    Case(
        one_step,
        {"x": Arg("activations", (6, 5)), "y": Arg("labels", (6,)), "where": ROWS["where"]},
        reason="the loss of a step before its update; the gradients written out are the test",
        rows={"x": 0, "y": 0, "where": 0},
        helper=True,
        name="counter_current",
        covers=("mutual.counter_current", "mutual.counter_current_loss"),
    ),
    Case(
        mutual.counter_current_alignment,
        {"activations": Arg("embeddings", (6, 4)), "signals": Arg("embeddings", (3, 4)), **ROWS},
        wrt=("activations", "signals"),
        rows={"activations": 0, "labels": 0, "where": 0},
        helper=True,
    ),
    Case(
        step_of_sgd,
        {"x": Arg("activations", (3, 2))},
        reason="an update is not differentiated",
        helper=True,
        name="counter_current_sgd",
        covers=("mutual.counter_current_sgd",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)
