"""MI-alpha against triple loops and a known information, the other losses of a pipeline, layers, mixup, recommender."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import distill, information

rng = np.random.default_rng(0)


def mi_alpha_oracle(f, baseline, keep, alpha):
    """Terms of the teachers, from the sums as they stand."""
    real = np.flatnonzero(keep)
    terms = np.zeros(len(f))
    for j in real:
        strangers = [i for i in real if i != j]

        def denominator(d, j=j):
            mean = np.mean([np.exp(f[i, j]) for i in real if i != d])
            return alpha * mean + (1 - alpha) * np.exp(baseline[j])

        joint = np.mean([f[j, j] - np.log(denominator(d)) for d in strangers])
        terms[j] = 1 + joint - np.mean([np.exp(f[i, j]) / denominator(j) for i in strangers])
    return terms


def test_the_bound_equals_the_loops():
    f, a = rng.normal(size=(6, 6)) * 2, rng.normal(size=6)
    keep = np.arange(6) != 2
    dirty = np.float32(np.where(keep[:, None] & keep[None], f, np.nan))

    @jax.jit
    def run(dirty, f, a):
        masked = [
            distill.mi_alpha_bound(dirty, alpha=alpha, log_baseline=a, where=keep) for alpha in (0.0, 0.01, 0.5, 1.0)
        ]
        others = distill.mi_alpha_bound(f, alpha=0.0), information.nwj_bound(f), distill.mi_alpha_bound(f, alpha=1.0)
        pair = [distill.mi_alpha_bound(f, alpha=alpha, where=jnp.arange(6) < 2) for alpha in (0.5, 1.0)]
        steep = [distill.mi_alpha_bound(80 * jnp.eye(6) - 40, alpha=alpha) for alpha in (0.0, 0.5, 1.0)]
        return masked, others, pair, steep

    masked, (nwj, known, nce), pair, steep = run(dirty, np.float32(f), np.float32(a))
    for got, alpha in zip(masked, (0.0, 0.01, 0.5, 1.0), strict=True):
        expected = mi_alpha_oracle(f, a, keep, alpha)[keep].mean()
        np.testing.assert_allclose(got, expected, rtol=1e-4, err_msg=str(alpha))
    np.testing.assert_allclose(nwj, known, rtol=1e-5)
    every = [[f[j, j] - np.log(np.mean([np.exp(f[i, j]) for i in range(6) if i != d])) for d in range(6) if d != j]
             for j in range(6)]  # fmt: skip
    np.testing.assert_allclose(nce, np.mean(every), rtol=1e-4)
    for got, alpha in zip(pair, (0.5, 1.0), strict=True):
        expected = mi_alpha_oracle(f, np.ones(6), np.arange(6) < 2, alpha)[:2].mean()
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert np.all(np.isfinite(steep)) and np.isclose(steep[2], np.log(5), rtol=1e-4)


def test_bias_and_variance_on_gaussians_whose_information_is_known():
    """Two nats, the best critic: no bound is exceeded, NWJ meets it, and variance falls where bias grows."""
    rho = np.sqrt(1 - np.exp(-2 * 2.0))

    @jax.jit
    def run(keys):
        def one(key):
            x, e = jax.random.normal(key, (2, 16))
            y = rho * x + np.sqrt(1 - rho**2) * e
            gap = jnp.square(y[None, :] - rho * x[:, None]) / (1 - rho**2)
            f = -0.5 * jnp.log(1 - rho**2) - 0.5 * gap + 0.5 * jnp.square(y)[None, :]
            zero = jnp.zeros(16)
            return [distill.mi_alpha_bound(f, alpha=alpha, log_baseline=zero) for alpha in (0.0, 0.2, 1.0)]

        return jnp.stack(jax.vmap(one)(keys))

    low, middle, high = np.asarray(run(jax.random.split(jax.random.key(0), 2000)), np.float64)
    error = lambda v: 3 * v.std() / np.sqrt(len(v))
    assert abs(low.mean() - 2) < error(low)
    assert high.mean() + error(high) < middle.mean() < 2 + error(middle)
    assert low.std() > 1.1 * middle.std() and middle.std() > 1.1 * high.std()


def test_the_loss_is_minus_the_bound_of_its_critics_scores():
    s, t = rng.normal(size=(6, 3)), rng.normal(size=(6, 4))
    critic = {"student": {"w": rng.normal(size=(3, 2))}, "teacher": {"w": rng.normal(size=(4, 2))}}
    where = np.arange(6) != 5
    f = (s @ critic["student"]["w"]) @ (t @ critic["teacher"]["w"]).T / np.sqrt(2)
    terms = mi_alpha_oracle(f, np.ones(6), where, 0.3)

    @jax.jit
    def run(s, t, critic):
        options = {"alpha": 0.3, "where": where}
        drawn = distill.bilinear_critic(2).init(jax.random.key(0), 3, 4)
        return [distill.mi_alpha_loss(s, t, critic, reduction=r, **options) for r in ("none", "mean")], drawn

    dirty = [np.float32(np.where(where[:, None], x, np.nan)) for x in (s, t)]
    (each, mean), drawn = run(*dirty, jax.tree.map(np.float32, critic))
    np.testing.assert_allclose(each, -terms, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean, -terms[where].mean(), rtol=1e-4)
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, critic)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_a_pipelines_loss_is_the_sum_of_its_parts():
    s, t = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    h, g = [rng.normal(size=(5, d)) for d in (2, 4)], [rng.normal(size=(5, d)) for d in (3, 2, 4)]
    y = np.array([0, 1, -1, 2, 0])
    projections = {"0_1": None, "1_0": rng.normal(size=(4, 3)), "1_2": None}
    layers = [[0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]
    weights = {"hard_weight": 0.5, "prediction_weight": 0.3, "intermediate_weight": 2.0}
    single = lambda tree: jax.tree.map(np.float32, tree)
    student, teacher = (single({"logits": z, "features": f}) for z, f in ((s, h), (t, g)))
    run = lambda **o: jax.jit(
        lambda a, b, p: distill.distiller_loss(a, b, jnp.asarray(y), p, layers, intermediate="mse", **weights, **o)
    )
    loss, parts = run(temperature=2.0)(student, teacher, single(projections))
    other, _ = run(prediction="mse")(student, teacher, single(projections))
    labelled = y >= 0
    hard = -np.mean(np.log(softmax(s)[labelled, y[labelled]]))
    p, q = softmax(s / 2), softmax(t / 2)
    soft = 4 * np.mean(np.sum(q * np.log(q / p), axis=1))
    inter = np.mean((h[0] - g[1]) ** 2) + 0.25 * np.mean((h[1] @ projections["1_0"] - g[0]) ** 2)
    inter += 0.75 * np.mean((h[1] - g[2]) ** 2)
    for name, value in (("hard", hard), ("prediction", soft), ("intermediate", inter)):
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, 0.5 * hard + 0.3 * soft + 2 * inter, rtol=1e-4)
    np.testing.assert_allclose(other, 0.5 * hard + 0.3 * np.mean((s - t) ** 2) + 2 * inter, rtol=1e-4)


def test_gaussian_likelihood_and_layers_and_transport():
    s, t, P, v = rng.normal(size=(4, 3)), rng.normal(size=(4, 2)), rng.normal(size=(3, 2)), rng.normal(size=2)
    where = np.arange(4) != 1
    cost = np.float32(rng.uniform(size=(2, 3)))
    loss, plan = jax.jit(
        lambda s: (
            distill.gaussian_information_loss(s, np.float32(t), np.float32(P), np.float32(v), where=where),
            distill.emd_layer_weights(cost),
        )
    )(np.float32(np.where(where[:, None], s, np.nan)))
    expected = np.mean([0.5 * np.sum((t[n] - s[n] @ P) ** 2 / np.exp(v) + v) for n in (0, 2, 3)])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(plan, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(np.sum(plan, axis=0), 2 / 3, atol=1e-5)
    pick = lambda rows: [row.index(1.0) for row in rows]
    assert pick(distill.layer_weights("skip", 3, 12)) == [3, 7, 11]
    assert pick(distill.layer_weights("skip", 2, 3)) == [1, 2] and pick(distill.layer_weights("last", 2, 5)) == [3, 4]
    assert np.allclose(np.sum(distill.layer_weights("all", 2, 3), axis=1), 1)


def test_mixup_mixes_examples_and_targets_alike():
    x, y = np.float32(np.eye(64)), np.float32(np.eye(64))
    mixed, targets = map(np.asarray, jax.jit(distill.mixup)(jax.random.key(0), x[:, None], y))
    np.testing.assert_allclose(mixed[:, 0], targets)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    own = np.diagonal(targets)
    np.testing.assert_array_less(own, 1 + 1e-6)
    # Beta(0.4, 0.4): mean 1/2, variance 1/4 / 1.8; sixty-four draws.
    assert abs(own.mean() - 0.5) < 0.15 and abs(own.var() - 0.139) < 0.05


def test_the_recommender_is_ridge_regression():
    z, c, s = rng.normal(size=(9, 2)), rng.normal(size=(9, 3)), rng.normal(size=9)
    rows = np.array([[1, *a, *b, *np.outer(a, b).ravel()] for a, b in zip(z, c, strict=True)])
    penalty = np.diag([1e-6, *[0.5] * 11])
    weights = np.linalg.inv(rows.T @ rows + penalty) @ rows.T @ s
    grid = rng.normal(size=(4, 3))

    @jax.jit
    def run(z, c, s, grid):
        model = distill.fit_recommender(z, c, s, ridge=0.5)
        return model.weights, distill.recommend_pipeline(model, z[0], grid)

    got, (best, scores) = run(*map(np.float32, (z, c, s, grid)))
    np.testing.assert_allclose(got, weights, rtol=2e-3, atol=1e-4)
    expected = [np.array([1, *z[0], *b, *np.outer(z[0], b).ravel()]) @ weights for b in grid]
    np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-3)
    assert best == np.argmax(expected)


def test_refuses():
    one, both = np.ones((3, 2), np.float32), {"logits": np.ones((3, 2)), "features": [np.ones((3, 2))]}
    for call, message in (
        (lambda: distill.mi_alpha_bound(one), "scores must be"),
        (lambda: distill.mi_alpha_bound(np.eye(2), alpha=2), "alpha=2"),
        (lambda: distill.mi_alpha_bound(np.eye(2), where=np.ones(3, bool)), "where has shape"),
        (lambda: distill.mi_alpha_bound(np.eye(2), log_baseline=np.ones(3)), "log_baseline has shape"),
        (lambda: distill.mi_alpha_loss(one, one[:2], {}), "features and teacher_features"),
        (lambda: distill.bilinear_critic(0), "size=0"),
        (lambda: distill.gaussian_information_loss(one, one[:2], one, one), "features and teacher_features"),
        (lambda: distill.gaussian_information_loss(one, one, one, one), "projection and log_variance"),
        (lambda: distill.distiller_loss(both, both, None, {}, [[1.0, 0.0]]), r"expected \(1, 1\)"),
        (lambda: distill.distiller_loss(both, both, None, {}, [[1.0]], prediction="l1"), "prediction='l1'"),
        (lambda: distill.layer_weights("first", 1, 2), "kind='first'"),
        (lambda: distill.layer_weights("skip", 3, 2), "num_layers=3"),
        (lambda: distill.emd_layer_weights(one[0]), "cost must be"),
        (lambda: distill.mixup(None, one, one[:2]), "targets must be"),
        (lambda: distill.mixup(None, one, one, concentration=0), "concentration=0"),
        (lambda: distill.mixup(None, one, one, share=2), "share=2"),
        (lambda: distill.fit_recommender(one, one, one[:2, 0]), "datasets, pipelines and scores"),
        (lambda: distill.fit_recommender(one, one, one[:, 0], ridge=0), "ridge=0"),
        (
            lambda: distill.recommend_pipeline(distill.PipelineRecommender(np.ones(4)), one[0], one),
            "the model has 4 weights",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


CRITIC = {n: {"w": np.float32(rng.normal(size=(4, 3)))} for n in ("student", "teacher")}
cast = lambda tree, x: jax.tree.map(lambda a: jnp.asarray(a, x.dtype), tree)


def loss_case(features, teacher_features, *, where=None, axis_name=None):
    return distill.mi_alpha_loss(
        features, teacher_features, cast(CRITIC, features), where=where, axis_name=axis_name
    )  # fmt: skip


def gaussian_case(features, teacher_features, projection, log_variance, *, where=None):
    return distill.gaussian_information_loss(
        features, teacher_features, projection, jnp.tanh(log_variance), where=where
    )


def pipeline_case(logits, features, teacher_logits, where):
    student = {"logits": logits, "features": (features,)}
    teacher = {"logits": teacher_logits, "features": (features[:, ::-1],)}
    options = {"intermediate": "unit", "where": where}
    return distill.distiller_loss(student, teacher, None, {"0_0": None}, [[1.0]], **options)[0]


def critic_case(features, teacher_features):
    return distill.bilinear_critic(3).apply(cast(CRITIC, features), features, teacher_features)


def recommender_case(datasets, pipelines, scores):
    datasets, pipelines = jnp.tanh(datasets), jnp.tanh(pipelines)
    model = distill.fit_recommender(datasets, pipelines, scores)
    return distill.recommend_pipeline(model, datasets[0], pipelines)[1]


FEATURES = {"features": Arg("embeddings", (6, 4)), "teacher_features": Arg("embeddings", (6, 4))}
WHERE, SCORES = {"where": Arg("where", (6,))}, Arg("scores", (6, 3))
CASES = [
    Case(
        loss_case,
        {**FEATURES, **WHERE},
        wrt=("features",),
        frozen=("teacher_features",),
        rows={"features": 0, "teacher_features": 0, "where": 0},
        symmetry="invariant",
        name="mi_alpha_loss",
        covers=("distill.mi_alpha_loss",),
    ),
    Case(distill.mi_alpha_bound, {"scores": Arg("scores", (6, 6)), **WHERE}, wrt=("scores",), helper=True),
    Case(critic_case, FEATURES, wrt=("features",), helper=True, covers=("distill.bilinear_critic",)),
    Case(
        gaussian_case,
        {**FEATURES, "projection": Arg("embeddings", (4, 4)), "log_variance": Arg("embeddings", (4,)), **WHERE},
        wrt=("features",),
        helper=True,
        covers=("distill.gaussian_information_loss",),
    ),
    Case(
        pipeline_case,
        {"logits": SCORES, "features": FEATURES["features"], "teacher_logits": SCORES, **WHERE},
        wrt=("logits", "features"),
        helper=True,
        covers=("distill.distiller_loss",),
    ),
    Case(distill.emd_layer_weights, {"cost": Arg("probabilities", (2, 3))}, frozen=("cost",), helper=True),
    Case(
        distill.mixup,
        {"key": Arg("key"), "x": Arg("activations", (6, 2, 2)), "targets": Arg("probabilities", (6, 3))},
        static={"share": 0.25},
        wrt=("x", "targets"),
        helper=True,
    ),
    Case(
        recommender_case,
        {"datasets": Arg("embeddings", (6, 2)), "pipelines": Arg("embeddings", (6, 3)), "scores": Arg("scores", (6,))},
        wrt=("scores",),
        helper=True,
        covers=("distill.fit_recommender", "distill.recommend_pipeline", "distill.PipelineRecommender"),
    ),
    Case(
        lambda cost: np.asarray(distill.layer_weights("skip", *cost.shape)),
        {"cost": Arg("weights", (2, 3))},
        host=True,
        name="layer_weights",
        covers=("distill.layer_weights",),
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
