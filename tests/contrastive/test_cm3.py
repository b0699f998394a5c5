"""CM3 against loops over pairs of items, dense powers of the adjacency matrix, and angles on the circle."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    calibrated_uniformity,
    cm3,
    cm3_loss,
    interaction_graph,
    recall_and_ndcg,
    spherical_bezier,
    uniformity,
)

rng = np.random.default_rng(0)


def drawn_params(net, *sizes):
    """Parameters in the shapes that `init` gives, drawn on the host: compiling `init` would cost a second."""
    shapes = jax.eval_shape(lambda key: net.init(key, *sizes), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), shapes)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def uniformity_oracle(x, f, low, high):
    x, f = unit(x), unit(f)
    terms = []
    for i in range(len(x)):
        for j in range(i):
            s = min(max(float(f[i] @ f[j]), low), high)
            terms.append(np.exp(-2 * (np.sum((x[i] - x[j]) ** 2) - 2 + 2 * s)))
    return np.log(np.mean(terms))


def test_losses_equal_the_loop():
    u, p, n, f = rng.normal(size=(4, 7, 5))
    where = np.arange(7) != 3
    dirty = [jnp.float32(np.where(where[:, None], x, np.nan)) for x in (u, p, n, f)]

    @jax.jit
    def run(u, p, n, f):
        options = {"low": 0.1, "high": 0.6, "where": where}
        one = jnp.ones_like(f)
        limits = [calibrated_uniformity(n, one, where=where), calibrated_uniformity(n, f, low=0, high=0, where=where)]
        return (
            cm3_loss(u, p, n, f, gamma=0.7, **options),
            calibrated_uniformity(n, f, **options),
            limits,
            uniformity(n, where=where),
        )

    loss, calibrated, limits, plain = run(*dirty)
    u, p, n, f = (x[where] for x in (u, p, n, f))
    expected = uniformity_oracle(n, f, 0.1, 0.6)
    np.testing.assert_allclose(calibrated, expected, rtol=1e-5)
    aligned = np.mean([np.sum((a - b) ** 2) for a, b in zip(unit(u), unit(p), strict=True)])
    plain_users = uniformity_oracle(u, np.ones_like(u), 0, 1)
    np.testing.assert_allclose(loss, aligned + 0.35 * (plain_users + expected), rtol=1e-5)
    # Equal features leave the plain uniformity, opposite ones the same and 4 (t = 2).
    np.testing.assert_allclose(limits, [plain, plain + 4], rtol=1e-5)


def test_gradient_is_largest_where_items_are_nearer_than_their_features():
    """Three pairs with one angle between the items and different ones between their features."""
    angle = lambda a: np.array([[np.cos(a), np.sin(a)]])
    items = np.concatenate([angle(a) for a in (0.0, 0.5, 3.1)])
    grad = jax.jit(jax.grad(lambda x, f: calibrated_uniformity(x, f, low=-1.0)))
    pull = []
    for between in (0.1, 0.5, 1.5):
        features = np.concatenate([angle(a) for a in (0.0, between, 3.1)])
        pull.append(float(np.linalg.norm(grad(jnp.float32(items), jnp.float32(features))[0])))
    assert pull[0] < pull[1] < pull[2]


def test_stop_gradient_holds_the_features():
    x, f = (jnp.float32(rng.normal(size=(4, 3))) for _ in range(2))
    for stop in (False, True):
        loss = lambda f, stop=stop: calibrated_uniformity(x, f, stop_gradient=stop)
        assert bool(np.any(jax.jit(jax.grad(loss))(f))) is not stop


def test_the_curve_divides_angles_and_ends_at_its_points():
    """On the circle: two points divide their angle; three are the parabola-like curve of repeated division."""
    angles = np.array([0.2, 1.0, 2.4])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[2.0], [0.5], [7.0]])
    ratio = np.linspace(0, 1, 5)
    many = jnp.float32(np.broadcast_to(points[:, None], (3, 5, 2)))
    run = jax.jit(lambda p, r: (spherical_bezier(p[:2], r), spherical_bezier(p, r), spherical_bezier(p[:1], r)))
    two, three, one = (np.asarray(x, np.float64) for x in run(many, jnp.float32(ratio)))
    at = lambda p: np.arctan2(p[:, 1], p[:, 0])
    divide = lambda a, b: ratio * a + (1 - ratio) * b
    np.testing.assert_allclose(at(two), divide(angles[0], angles[1]), rtol=1e-5)
    expected = divide(divide(angles[0], angles[1]), divide(angles[1], angles[2]))
    np.testing.assert_allclose(at(three), expected, rtol=1e-5)
    np.testing.assert_allclose(at(one), angles[0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(three, axis=1), 1, rtol=1e-6)


def test_points_that_are_equal_opposite_or_nearly_so():
    a = unit(rng.normal(size=3))
    points = np.stack([[a, a, a, a], [a, -a, a + 1e-7, -a + 1e-7]])
    call = lambda p: spherical_bezier(p, jnp.float32(0.25))
    value, grad = jax.jit(lambda p: (call(p), jax.grad(lambda p: jnp.sum(call(p)))(p)))(jnp.float32(points))
    np.testing.assert_allclose(value, [a, -a, a, -a], atol=1e-5)
    assert np.all(np.isfinite(grad)) and np.any(grad)


def test_the_graph_and_the_network_equal_dense_matrices():
    """Five users, four items of which one is taken by nobody, and padding at the end."""
    users, items = np.array([0, 0, 1, 2, 3, 4, 4, 9]), np.array([0, 1, 1, 2, 0, 1, 2, 9])
    where = np.arange(8) < 7
    features = [rng.normal(size=(4, 3)), rng.normal(size=(4, 2))]
    graph = interaction_graph(
        jnp.asarray(users), jnp.asarray(items), [jnp.float32(f) for f in features], num_users=5, k=2,
        feature_weights=(0.9, 0.1), where=jnp.asarray(where),
    )  # fmt: skip
    A = np.zeros((9, 9))
    for u, i in zip(users[:7], items[:7], strict=True):
        A[u, 5 + i] = A[5 + i, u] = 1
    degree = A.sum(1)
    A = A / np.sqrt(np.maximum(degree[:, None] * degree[None, :], 1))
    S = np.zeros((4, 4))
    for share, f in zip((0.9, 0.1), features, strict=True):
        cosine = unit(f) @ unit(f).T
        for i in range(4):
            for j in np.argsort(-cosine[i])[:2]:
                S[i, j] += share / 2
    got = np.zeros((4, 4))
    for i in range(4):
        np.add.at(got[i], np.asarray(graph.neighbours[i]), np.asarray(graph.neighbour_weights[i]))
    np.testing.assert_allclose(got, S, rtol=1e-6)

    size = 3
    net = cm3(5, size=size, num_layers=2)
    params = drawn_params(net, 3, 2)
    run = jax.jit(lambda key, *f: (net.apply(params, f, graph), net.apply(params, f, graph, key=key)[2]))
    (got_users, got_items, mix), drawn = run(jax.random.key(1), *(jnp.float32(f) for f in features))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = lambda w, x: x @ w["w"] + w.get("b", 0)
    ends = [unit(layer(p[f"modality_{m}"]["project"], features[m])) for m in range(2)]
    expected_mix = unit(ends[0] + ends[1])  # the middle of an arc
    np.testing.assert_allclose(mix, expected_mix, rtol=1e-4, atol=1e-5)
    own = []
    for m in range(2):
        hidden = layer(p[f"modality_{m}"]["wide"], features[m])
        own.append(layer(p[f"modality_{m}"]["narrow"], np.where(hidden > 0, hidden, 0.01 * hidden)))
    free = [p["modality_0"]["user"], p["modality_1"]["user"], p["user_id"]]
    x = np.concatenate([np.concatenate([unit(u), unit(i)]) for u, i in zip(free, [*own, expected_mix], strict=True)], 1)
    h = x + A @ x + A @ A @ x
    share = np.exp(p["share"]) / np.exp(p["share"]).sum(1, keepdims=True)
    np.testing.assert_allclose(got_users, h[:5] * share.repeat(size, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_items, h[5:] + S @ h[5:], rtol=1e-4, atol=1e-5)
    # A drawn place lies on the arc between the ends.
    cosine = lambda a, b: np.arccos(np.clip((a * b).sum(1), -1, 1))
    np.testing.assert_allclose(cosine(ends[0], drawn) + cosine(drawn, ends[1]), cosine(*ends), atol=3e-3)
    assert np.any(np.abs(drawn - mix) > 1e-3)


def test_recall_and_ndcg_equal_the_loop():
    scores, relevant = rng.permuted(np.tile(np.arange(8.0), (6, 1)), axis=1), rng.uniform(size=(6, 8)) < 0.4
    where = rng.uniform(size=(6, 8)) < 0.8
    relevant[0] = False
    dirty = np.where(where, scores, np.inf)
    run = jax.jit(lambda s: [recall_and_ndcg(s, relevant, k=3, where=where, reduction=r) for r in ("none", "mean")])
    rows, means = run(jnp.float32(dirty))
    perfect, _ = recall_and_ndcg(jnp.float32(relevant), jnp.asarray(relevant), k=50)
    assert perfect == 1
    expected = []
    for u in range(6):
        order = sorted((i for i in range(8) if where[u, i]), key=lambda i, u=u: -scores[u, i])[:3]
        total = sum(relevant[u] & where[u])
        gain = sum(1 / np.log2(rank + 2) for rank, i in enumerate(order) if relevant[u, i])
        best = sum(1 / np.log2(rank + 2) for rank in range(min(3, total)))
        expected.append((sum(relevant[u, i] for i in order) / total, gain / best) if total else (0, 0))
    np.testing.assert_allclose(np.stack(rows, 1), expected, rtol=1e-5)
    some = (relevant & where).any(1)
    np.testing.assert_allclose(means, np.array(expected)[some].mean(0), rtol=1e-5)


def test_refuses():
    x, f = jnp.ones((3, 2)), jnp.ones((3, 4))
    index = jnp.zeros(3, int)
    with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
        cm3_loss(x, x, x[:2], f)
    with pytest.raises(ValueError, match=r"must be \[N, D\] and \[N, F\]"):
        calibrated_uniformity(x, f[:2])
    with pytest.raises(ValueError, match="low=3"):
        calibrated_uniformity(x, f, low=3, high=2)
    with pytest.raises(ValueError, match="t=0"):
        calibrated_uniformity(x, f, t=0)
    with pytest.raises(ValueError, match="ratio has shape"):
        spherical_bezier(jnp.ones((2, 3, 4)), jnp.ones(2))
    with pytest.raises(ValueError, match="M >= 1"):
        spherical_bezier(jnp.ones((0, 3)), 0.5)
    with pytest.raises(ValueError, match="k=4 must be"):
        interaction_graph(index, index, [f], num_users=2, k=4)
    with pytest.raises(ValueError, match="feature_weights has 2"):
        interaction_graph(index, index, [f], num_users=2, k=1, feature_weights=(1, 2))
    with pytest.raises(ValueError, match="for each modality"):
        interaction_graph(index, index, [], num_users=2)
    with pytest.raises(ValueError, match=r"one shape \[E\]"):
        interaction_graph(index, x, [f], num_users=2)
    with pytest.raises(ValueError, match="concentration=0"):
        cm3(3, concentration=0)
    with pytest.raises(ValueError, match="size=0"):
        cm3(3, size=0)
    with pytest.raises(ValueError, match="must be 1 arrays"):
        cm3(3).apply({"modality_0": {}}, [x, f], None)
    with pytest.raises(ValueError, match="k=0"):
        recall_and_ndcg(x, x > 0, k=0)
    with pytest.raises(ValueError, match=r"one shape \[U, I\]"):
        recall_and_ndcg(x, f > 0)


GRAPH = ([0, 1, 2, 2], [0, 1, 1, 3])


NETWORK = cm3(3, size=2, num_layers=1)
PARAMS = drawn_params(NETWORK, 3, 2)


def network_case(text, image):
    graph = interaction_graph(jnp.array(GRAPH[0]), jnp.array(GRAPH[1]), [text, image], num_users=3, k=2)
    return NETWORK.apply(PARAMS, [text, image], graph)


ROWS = dict.fromkeys(("users", "positives", "negatives", "features", "where"), 0)
CASES = [
    Case(
        cm3_loss,
        {**{name: Arg("embeddings", (6, 4)) for name in list(ROWS)[:3]}, "features": Arg("embeddings", (6, 3)),
         "where": Arg("where", (6,))},
        wrt=("users", "positives", "negatives", "features"),
        rows=ROWS,
        symmetry="invariant",
    ),
    Case(
        calibrated_uniformity,
        {"embeddings": Arg("embeddings", (6, 4)), "features": Arg("embeddings", (6, 3)), "where": Arg("where", (6,))},
        wrt=("embeddings", "features"),
        helper=True,
    ),
    Case(
        spherical_bezier,
        {"points": Arg("embeddings", (3, 5, 4)), "ratio": Arg("weights", (5,))},
        wrt=("points", "ratio"),
        helper=True,
    ),
    Case(
        network_case,
        {"text": Arg("embeddings", (4, 3)), "image": Arg("embeddings", (4, 2))},
        wrt=("text", "image"),
        helper=True,
        covers=("contrastive.cm3", "contrastive.interaction_graph"),
    ),
    Case(
        recall_and_ndcg,
        {"scores": Arg("scores", (5, 6)), "relevant": Arg("where", (5, 6))},
        static={"k": 3},
        reason="a ranking has no gradient",
        helper=True,
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
