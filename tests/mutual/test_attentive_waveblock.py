"""WaveBlock, its attention, and mutual mean-teaching against loops in float64."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import mutual
from jaxlab.types import Layer

rng = np.random.default_rng(0)
sigmoid = lambda a: 1 / (1 + np.exp(-a))
single = lambda tree: jax.tree.map(jnp.float32, tree)
noisy = lambda tree: jax.tree.map(lambda a: np.asarray(a + rng.normal(size=a.shape) * 0.3, np.float64), tree)


def test_one_block_stays_and_the_rest_is_scaled():
    """For 800 keys: round(0.3 * 10) adjoining rows at 1, the others at 1.5, each of the 8 starts as often."""
    x = jnp.float32(rng.normal(size=(2, 10, 3, 4)))
    run = lambda key, x: mutual.waveblock(x, key=key, train=True)
    waved, grad = jax.jit(jax.vmap(lambda key: (run(key, x), jax.grad(lambda x: jnp.sum(run(key, x)))(x))))(
        jax.random.split(jax.random.key(0), 800)
    )
    starts = []
    for y, g in zip(np.asarray(waved), np.asarray(grad), strict=True):
        ratio = y / np.asarray(x)
        np.testing.assert_allclose(ratio, g, rtol=1e-5)
        row = ratio[0, :, 0, 0].round(4)
        assert np.all(ratio.round(4) == row[None, :, None, None])
        still = np.flatnonzero(row == 1)
        assert still.tolist() == list(range(still[0], still[0] + 3)) and set(row) == {1.0, 1.5}
        starts.append(still[0])
    counts = np.bincount(starts, minlength=8)
    assert len(counts) == 8 and np.sum((counts - 100) ** 2 / 100) < 24.3  # chi-square, 7 degrees of freedom, 0.1%


def test_a_test_has_no_block():
    x = np.float32(rng.normal(size=(2, 5, 3)))
    assert mutual.waveblock(x) is x

    def waved(key, x):
        wide = jnp.ones((1, 2, 10))
        across = mutual.waveblock(wide, key=key, train=True, axis=-1, rate=0.5, scale=2.0)
        return mutual.waveblock(x, key=key, train=True, scale=1.0), across

    same, across = jax.jit(waved)(jax.random.key(0), x)
    np.testing.assert_array_equal(same, x)
    assert np.sum(across == 1) == 10 and np.sum(across == 2) == 10


def batch_norm_oracle(y, params, state, train):
    axes = tuple(range(y.ndim - 1))
    mean, var = (y.mean(axes), y.var(axes)) if train else (state["mean"], state["var"])
    return (y - mean) / np.sqrt(var + 1e-5) * params["gain"] + params["bias"]


def passes(layer, x):
    """Returns noisy parameters and state, and what they give for x in training, in a test, and before the noise."""
    params, state = jax.jit(layer.init, static_argnums=1)(jax.random.key(0), 6)
    fresh, (params, state) = (params, state), (noisy(params), noisy(state))

    def run(fresh, params, state, x):
        trained, tested = (layer.apply(params, state, x, train=train) for train in (True, False))
        return trained, tested, layer.apply(*fresh, x, train=True)[0]

    return params, state, jax.jit(run)(fresh, single(params), single(state), jnp.float32(x))


def test_attention_equals_the_loops():
    x = rng.normal(size=(3, 5, 4, 6))
    params, state, (trained, tested, _) = passes(mutual.cbam(reduction=3, size=3), x)
    hidden = lambda v: np.maximum(v @ params["gate"]["dense_0"]["w"] + params["gate"]["dense_0"]["b"], 0)
    gate = lambda v: hidden(v) @ params["gate"]["dense_1"]["w"] + params["gate"]["dense_1"]["b"]
    y = np.zeros_like(x)
    for n in range(3):
        y[n] = x[n] * sigmoid(gate(x[n].mean((0, 1))) + gate(x[n].max((0, 1))))
    spatial = np.zeros((3, 5, 4, 1))
    for n, i, j, a, b in np.ndindex(3, 5, 4, 3, 3):
        row, column = i + a - 1, j + b - 1
        if 0 <= row < 5 and 0 <= column < 4:
            pixel = y[n, row, column]
            spatial[n, i, j] += params["conv"][a, b, 0] * pixel.max() + params["conv"][a, b, 1] * pixel.mean()
    for train, (got, new) in ((True, trained), (False, tested)):
        expected = y * sigmoid(batch_norm_oracle(spatial, params["norm"], state, train))
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
        moved = 0.99 * state["mean"] + 0.01 * spatial.mean() if train else state["mean"]
        np.testing.assert_allclose(new["mean"], moved, rtol=1e-4)

    params, state, (trained, tested, fresh) = passes(mutual.nonlocal_block(features=2), x)
    np.testing.assert_array_equal(fresh, np.float32(x))
    y = np.zeros_like(x)
    for n in range(3):
        flat = x[n].reshape(20, 6)
        theta, phi, g = (flat @ params[m]["w"] + params[m]["b"] for m in ("theta", "phi", "g"))
        for p in range(20):
            mixed = sum((theta[p] @ phi[q]) / 20 * g[q] for q in range(20))
            y[n].reshape(20, 6)[p] = mixed @ params["out"]["w"] + params["out"]["b"]
    for train, (got, _) in ((True, trained), (False, tested)):
        expected = x + batch_norm_oracle(y, params["norm"], state, train)
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)


def triplet_oracle(f, y, where, teacher=None):
    """Terms of the anchors that have a positive and a negative."""
    d = lambda a, b: np.sqrt(max(np.sum((a - b) ** 2), 1e-12))
    terms, same = {}, teacher is None
    teacher = f if same else teacher
    real = [i for i in range(len(y)) if where[i] and y[i] >= 0]
    for i in real:
        positive = [j for j in real if j != i and y[j] == y[i]]
        negative = [j for j in real if y[j] != y[i]]
        if positive and negative:
            p, n = max(positive, key=lambda j: d(f[i], f[j])), min(negative, key=lambda j: d(f[i], f[j]))
            T = [np.exp(d(g[i], g[n])) / (np.exp(d(g[i], g[n])) + np.exp(d(g[i], g[p]))) for g in (f, teacher)]
            q = 1.0 if same else T[1]
            terms[i] = -q * np.log(T[0]) - (1 - q) * np.log(1 - T[0])
    return terms


Y = np.array([0, 0, 1, 1, 2, -1, 1, 0], np.int32)
WHERE = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)


def test_triplets_equal_the_loop():
    f, t = rng.normal(size=(8, 3)), rng.normal(size=(8, 4))
    dirty = [np.where(WHERE[:, None], a, np.nan) for a in (f, t)]

    @jax.jit
    def losses(f, t):
        run = lambda **options: mutual.soft_triplet_loss(f, Y, where=WHERE, **options)
        return [(run(**o, reduction="none"), run(**o)) for o in ({}, {"teacher_features": t})]

    for teacher, (each, mean) in zip((None, dirty[1]), losses(*map(np.float32, dirty)), strict=True):
        terms = triplet_oracle(f, Y, WHERE, teacher)
        assert set(terms) == {0, 1, 2, 3, 6}
        np.testing.assert_allclose(each, [terms.get(i, 0.0) for i in range(8)], rtol=1e-5)
        np.testing.assert_allclose(mean, np.mean(list(terms.values())), rtol=1e-5)
    wide = np.pad(f, ((0, 0), (0, 1)))  # as wide as the other teacher, so that nothing is compiled anew
    (_, alone), (_, apart) = (losses(np.float32(f * size), np.float32(wide))[1] for size in (1.0, 1.3))
    assert alone < apart


def net():
    def apply(params, x):
        features = x @ params["f"]
        return {"logits": features @ params["c"], "features": features}

    def init(key, d):
        keys = jax.random.split(key)
        return {"f": jax.random.normal(keys[0], (d, 4)), "c": jax.random.normal(keys[1], (4, 3))}

    return Layer(init, apply)


def test_mutual_mean_teaching_equals_the_losses_of_the_paper():
    """Two peers, each taught by the other's average; the weights of the four terms, and smoothing."""
    x = rng.normal(size=(8, 5)).astype(np.float32)
    learner = mutual.mutual_mean_teaching(
        net(), optax.sgd(0.1), soft_weight=0.4, soft_triplet_weight=0.7, smoothing=0.2
    )
    batch = {"x": x, "y": Y, "where": WHERE}
    state = jax.jit(learner.init)(jax.random.key(0), batch)
    teacher = noisy(state.teacher_params)
    state = state.__class__(**{**vars(state), "teacher_params": single(teacher)})
    new, metrics = jax.jit(learner.update)(state, batch, jax.random.key(1))

    def outputs(params, k):
        f = x.astype(np.float64) @ np.asarray(params["f"][k], np.float64)
        z = f @ np.asarray(params["c"][k], np.float64)
        return f, z - np.log(np.exp(z).sum(-1, keepdims=True))

    for k in range(2):
        f, log_p = outputs(state.params, k)
        g, log_q = outputs(teacher, 1 - k)
        labelled = [i for i in range(8) if WHERE[i] and Y[i] >= 0]
        smooth = lambda i: 0.8 * np.eye(3)[Y[i]] + 0.2 / 3
        hard = np.mean([-smooth(i) @ log_p[i] for i in labelled])
        soft = np.mean([-np.exp(log_q[i]) @ log_p[i] for i in np.flatnonzero(WHERE)])
        triplet = np.mean(list(triplet_oracle(f, Y, WHERE).values()))
        soft_triplet = np.mean(list(triplet_oracle(f, Y, WHERE, g).values()))
        parts = {"hard": hard, "soft": soft, "triplet": triplet, "soft_triplet": soft_triplet}
        for name, value in parts.items():
            np.testing.assert_allclose(metrics[name][k], value, rtol=2e-5, err_msg=name)
        loss = 0.6 * hard + 0.4 * soft + 0.3 * triplet + 0.7 * soft_triplet
        np.testing.assert_allclose(metrics["loss"][k], loss, rtol=2e-5)
    # At the first step the average is the network itself.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), new.teacher_params, new.params)


def test_pseudo_labels_group_directions():
    """Three directions, two networks with features of any length; the classifier's weights have length 1."""
    angle = np.repeat([0.1, 1.5, 3.0], 6) + rng.normal(size=18) * 0.05
    one = np.stack([np.cos(angle), np.sin(angle)], -1) * rng.uniform(0.1, 9, (18, 1))
    features = np.stack([one, one @ [[0.0, 1.0], [-1.0, 0.0]]])
    where = np.arange(18) != 17
    features[:, 17] = np.nan
    labels, centroids = jax.jit(
        lambda key, f: mutual.cluster_pseudo_labels(key, f, num_clusters=3, where=jnp.asarray(where))
    )(jax.random.key(0), jnp.float32(features))
    labels = np.asarray(labels)
    assert [len(set(labels[i : i + 5])) for i in (0, 6, 12)] == [1, 1, 1] and len(set(labels[:17])) == 3
    assert labels[17] == -1
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=-1), 1, rtol=1e-5)
    unit = np.nan_to_num(features / np.linalg.norm(features, axis=-1, keepdims=True)).mean(0)
    middle = unit[:6].mean(0)
    np.testing.assert_allclose(centroids[labels[0]], middle / np.linalg.norm(middle), rtol=1e-4)


def test_complementarity_equals_the_loop():
    a, b, where = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), np.arange(6) != 1
    cosines = [a[i] @ b[i] / np.linalg.norm(a[i]) / np.linalg.norm(b[i]) for i in range(6) if where[i]]
    got = jax.jit(mutual.complementarity)(np.float32(a), np.float32(b), where=where)
    np.testing.assert_allclose(got, 1 - np.mean(cosines), rtol=1e-5)


def test_refuses():
    x = jnp.ones((2, 4, 3, 5))
    with pytest.raises(ValueError, match="key=None"):
        mutual.waveblock(x, train=True)
    with pytest.raises(ValueError, match="rate=2"):
        mutual.waveblock(x, rate=2)
    with pytest.raises(ValueError, match="axis=4"):
        mutual.waveblock(x, axis=4)
    with pytest.raises(ValueError, match="reduction=0"):
        mutual.cbam(reduction=0)
    with pytest.raises(ValueError, match="size=4"):
        mutual.cbam(size=4)
    with pytest.raises(ValueError, match="features=0"):
        mutual.nonlocal_block(features=0)
    layer = mutual.cbam()
    with pytest.raises(ValueError, match=r"expected \[N, H, W, 4\]"):
        jax.eval_shape(lambda key: layer.apply(*layer.init(key, 4), x), jax.random.key(0))
    with pytest.raises(ValueError, match="smoothing=2"):
        mutual.mutual_mean_teaching(net(), optax.sgd(0.1), smoothing=2)
    with pytest.raises(ValueError, match=r"no \['features'\]"):
        learner = mutual.mutual_mean_teaching(Layer(net().init, lambda p, x: x @ p["f"]), optax.sgd(0.1))
        batch = {"x": jnp.ones((4, 2)), "y": jnp.zeros(4, int)}
        jax.eval_shape(lambda key: learner.update(learner.init(key, batch), batch, key), jax.random.key(0))
    with pytest.raises(ValueError, match="features and labels"):
        mutual.soft_triplet_loss(x[0, 0], jnp.zeros(2, int))
    with pytest.raises(ValueError, match="teacher_features must"):
        mutual.soft_triplet_loss(x[0, 0], jnp.zeros(3, int), teacher_features=x[0])
    with pytest.raises(ValueError, match="where has shape"):
        mutual.soft_triplet_loss(x[0, 0], jnp.zeros(3, int), where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"features must be \[K, N, D\]"):
        mutual.cluster_pseudo_labels(jax.random.key(0), x, num_clusters=2)
    with pytest.raises(ValueError, match="a and b"):
        mutual.complementarity(x[0, 0], x[0, 0, :2])


def from_seed(seed, x):
    return mutual.waveblock(x, key=jax.random.key(seed), train=True)


def layer_case(make, **options):
    """One pass in test mode at fixed parameters, whose examples do not meet."""
    layer = make(**options)
    drawn = jax.eval_shape(lambda: layer.init(jax.random.key(0), 4))
    params, state = jax.tree.map(lambda a: np.abs(rng.normal(size=a.shape)).astype(np.float32), drawn)

    def apply(x):
        cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, x.dtype), tree)
        return layer.apply(cast(params), cast(state), x)[0]

    apply.__name__ = make.__name__
    return Case(
        apply,
        {"x": Arg("activations", (6, 3, 2, 4))},
        wrt=("x",),
        rows={"x": 0},
        symmetry="equivariant",
        helper=True,
        covers=(f"mutual.{make.__name__}",),
    )


@jax.jit
def pseudo_labels(seed, features, where):
    return mutual.cluster_pseudo_labels(jax.random.key(seed), features, num_clusters=2, num_starts=1, where=where)


PEERS = {"f": np.float32(rng.normal(size=(2, 4, 4))), "c": np.float32(rng.normal(size=(2, 4, 3)))}


@jax.jit
def one_step(x, y, where):
    learner = mutual.mutual_mean_teaching(net(), optax.sgd(0.1))
    batch = {"x": x, "y": y, "where": where}
    params = {name: jnp.asarray(value, x.dtype) for name, value in PEERS.items()}
    _, metrics = learner.update(learner.init(None, batch, params=params), batch, jax.random.key(1))
    return jnp.mean(metrics["loss"])


ROWS = {"labels": Arg("labels", (6,)), "where": Arg("where", (6,))}
CASES = [
    Case(
        from_seed,
        {"seed": Arg("index", high=9), "x": Arg("activations", (4, 5, 3))},
        wrt=("x",),
        rows={"x": 0},
        symmetry="equivariant",
        helper=True,
        name="waveblock",
        covers=("mutual.waveblock",),
    ),
    layer_case(mutual.cbam, size=3),
    layer_case(mutual.nonlocal_block),
    Case(
        mutual.soft_triplet_loss,
        {"features": Arg("embeddings", (6, 4)), "teacher_features": Arg("embeddings", (6, 4)), **ROWS},
        wrt=("features",),
        frozen=("teacher_features",),
        rows={"features": 0, "teacher_features": 0, "labels": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(
        pseudo_labels,
        {"seed": Arg("index", high=9), "features": Arg("embeddings", (2, 6, 3)), "where": Arg("where", (6,))},
        rows={"features": 1, "where": 0},
        reason="pseudo-labels are constants",
        helper=True,
        name="cluster_pseudo_labels",
        covers=("mutual.cluster_pseudo_labels",),
    ),
    Case(
        mutual.complementarity,
        {"a": Arg("embeddings", (6, 4)), "b": Arg("embeddings", (6, 4)), "where": ROWS["where"]},
        wrt=("a", "b"),
        rows={"a": 0, "b": 0, "where": 0},
        symmetry="invariant",
        helper=True,
    ),
    Case(
        one_step,
        {"x": Arg("embeddings", (6, 4)), "y": Arg("labels", (6,)), "where": ROWS["where"]},
        reason="the averaged network starts as the network and is a constant",
        rows={"x": 0, "y": 0, "where": 0},
        helper=True,
        name="mutual_mean_teaching",
        covers=("mutual.mutual_mean_teaching",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)
