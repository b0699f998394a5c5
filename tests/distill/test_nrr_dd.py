"""Distances, activation maps, refinement, patches and mixing against loops."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import distill

rng = np.random.default_rng(0)
N, C = 7, 4
Z, A, B = rng.normal(size=(N, C)) * 3, rng.integers(0, C, N), rng.integers(0, C, N)
log_softmax = lambda z: z - z.max() - np.log(np.sum(np.exp(z - z.max())))


@pytest.mark.parametrize("power", [1, 2])
def test_distances_equal_the_loop(power):
    where, labels = np.arange(N) != 3, np.where(np.arange(N) == 5, -1, A)
    stored = rng.uniform(0, 3, (N, 2))
    terms = np.zeros(N)
    for n in range(N):
        if where[n] and labels[n] >= 0:
            own = -log_softmax(Z[n])[[A[n], B[n]]]
            terms[n] = np.sum(np.abs(own - stored[n]) ** power)
    dirty = jnp.float32(np.where(where[:, None], Z, np.nan))
    options = {"power": power, "where": where}
    got = distill.distance_loss(dirty, labels, B, jnp.float32(stored), reduction="none", **options)
    np.testing.assert_allclose(got, terms, rtol=1e-5)
    got = distill.distance_loss(dirty, labels, B, jnp.float32(stored), **options)
    np.testing.assert_allclose(got, terms.sum() / 5, rtol=1e-5)


def test_two_distances_tell_everything_about_two_classes():
    """With C = 2 the loss is 0 only where the predictions agree."""
    z, a, b = jnp.float32(rng.normal(size=(N, 2))), np.zeros(N, int), np.ones(N, int)
    stored = distill.label_distances(z, a, b)
    assert distill.distance_loss(z + 5.0, a, b, stored) < 1e-5
    turned = distill.distance_loss(z[:, ::-1], a, b, stored, reduction="none")
    np.testing.assert_allclose(turned, 2 * np.abs(z[:, 0] - z[:, 1]), rtol=1e-4)


def test_activation_maps_equal_the_loop():
    f, w, y = rng.normal(size=(3, 2, 3, 5)), rng.normal(size=(5, C)), np.array([0, 2, 3])
    got = distill.class_activation_map(jnp.float32(f), jnp.float32(w), y, size=(2, 3))
    for n in range(3):
        seen = np.maximum(f[n] @ w[:, y[n]], 0)
        expected = (seen - seen.min()) / (np.ptp(seen) or 1)
        np.testing.assert_allclose(got[n], expected, atol=1e-5)
    large = distill.class_activation_map(jnp.float32(f), jnp.float32(w), y, size=(8, 9))
    assert large.shape == (3, 8, 9) and large.min() >= 0 and large.max() <= 1
    assert not np.any(distill.class_activation_map(jnp.zeros((1, 2, 2, 5)), jnp.float32(w), y[:1], size=(4, 4)))


def test_only_what_does_not_matter_moves():
    x, seen = rng.normal(size=(2, 4, 3, 1)), rng.uniform(0, 1, (2, 4, 3))
    target = rng.normal(size=x.shape)
    loss = lambda x: jnp.sum(jnp.square(x - jnp.float32(target)))
    got = distill.refine_non_critical(jnp.float32(x), jnp.float32(seen), loss, steps=3, learning_rate=0.2)
    room, expected = np.maximum(0.5 - seen, 0)[..., None], x.copy()
    for _ in range(3):
        expected = expected - 0.2 * room * 2 * (expected - target)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(got)[seen >= 0.5], np.float32(x)[seen >= 0.5])
    assert loss(got) < loss(jnp.float32(x))
    still = distill.refine_non_critical(jnp.float32(x), jnp.float32(seen), loss, steps=3, threshold=0.0)
    np.testing.assert_array_equal(still, np.float32(x))


def test_patches_are_seen_first_and_unsure_second():
    activation, sure = rng.uniform(size=(5, 4)), rng.uniform(size=(5, 4))
    where = np.arange(5) != 1
    pool = []
    for i in np.flatnonzero(where):
        pool += [(sure[i, p], i * 4 + p) for p in np.argsort(-activation[i])[:2]]
    expected = [number for _, number in sorted(pool)] + [-1, -1]
    got = distill.select_patches(jnp.float32(activation), jnp.float32(sure), top=2, count=10, where=jnp.asarray(where))
    np.testing.assert_array_equal(got, expected)


def test_statistics_and_grids():
    own = [(rng.normal(size=3), rng.normal(size=3)) for _ in range(2)]
    kept = [(rng.normal(size=3), rng.normal(size=3)) for _ in range(2)]
    single = lambda tree: jax.tree.map(jnp.float32, tree)
    expected = sum(np.sum((a - b) ** 2) for p, q in zip(own, kept, strict=True) for a, b in zip(p, q, strict=True))
    np.testing.assert_allclose(distill.statistics_loss(single(own), single(kept)), expected, rtol=1e-5)
    assert distill.statistics_loss(single(own), single(own)) == 0
    patches = rng.normal(size=(8, 2, 3, 1))
    grid = np.asarray(distill.compose_grid(jnp.float32(patches)))
    for n, i, j in np.ndindex(2, 2, 2):
        cell = grid[n, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
        np.testing.assert_array_equal(cell, np.float32(patches[4 * n + 2 * i + j]))


def test_mixing_is_one_box_of_the_wanted_size():
    x, other = jnp.ones((2, 10, 12, 1)), jnp.zeros((2, 10, 12, 1))
    mixed, share = jax.jit(jax.vmap(lambda key: distill.cutmix(key, x, other, share=0.75)))(
        jax.random.split(jax.random.key(0), 200)
    )
    mixed = np.asarray(mixed)
    np.testing.assert_allclose(mixed.mean((1, 2, 3, 4)), share, rtol=1e-6)
    for image in mixed[:, 0, :, :, 0]:
        rows, columns = np.flatnonzero((image == 0).any(1)), np.flatnonzero((image == 0).any(0))
        assert np.all(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 0)
        assert len(rows) <= 5 and len(columns) <= 6 and np.sum(image == 0) == len(rows) * len(columns)
    assert np.sum(np.isclose(share, 0.75)) > 40 and len({tuple(i.ravel()) for i in mixed[:, 0]}) > 50
    whole, _ = distill.cutmix(jax.random.key(0), x, other, share=1.0)
    np.testing.assert_array_equal(whole, x)


def test_refuses():
    z, y, x = jnp.ones((3, 2)), jnp.zeros(3, int), jnp.ones((2, 4, 4, 1))
    with pytest.raises(ValueError, match="power=3"):
        distill.distance_loss(z, y, y, z, power=3)
    with pytest.raises(ValueError, match="distances has shape"):
        distill.distance_loss(z, y, y, z[:2])
    with pytest.raises(ValueError, match="where has shape"):
        distill.distance_loss(z, y, y, z, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="labels and mixed_labels"):
        distill.label_distances(z, y, y[:2])
    with pytest.raises(ValueError, match="features and weights"):
        distill.class_activation_map(x, z, y, size=(2, 2))
    with pytest.raises(ValueError, match="labels has shape"):
        distill.class_activation_map(x, z[:1], y, size=(2, 2))
    with pytest.raises(ValueError, match="x and activation"):
        distill.refine_non_critical(x, x, jnp.sum, steps=1)
    with pytest.raises(ValueError, match="steps=-1"):
        distill.refine_non_critical(x, x[..., 0], jnp.sum, steps=-1)
    with pytest.raises(ValueError, match="as many layers"):
        distill.statistics_loss([], [])
    with pytest.raises(ValueError, match="activation and confidence"):
        distill.select_patches(z, z[:2], top=1, count=1)
    with pytest.raises(ValueError, match="top=3"):
        distill.select_patches(z, z, top=3, count=1)
    with pytest.raises(ValueError, match="count=7"):
        distill.select_patches(z, z, top=2, count=7)
    with pytest.raises(ValueError, match="side=3"):
        distill.compose_grid(x, side=3)
    with pytest.raises(ValueError, match="x and other"):
        distill.cutmix(jax.random.key(0), x, x[:1])


def refined(x, activation):
    return distill.refine_non_critical(x, activation, lambda x: jnp.sum(jnp.sin(x)), steps=2)


def statistics(mean, var, running):
    return distill.statistics_loss([(mean, var)], [(running, running)])


def mixed(seed, x, other):
    return distill.cutmix(jax.random.key(seed), x, other, share=0.5)[0]


def activation(features, weights, labels):
    return distill.class_activation_map(features, weights, labels, size=(3, 3))


IMAGES = Arg("activations", (4, 4, 4, 1))
LABELS = {"labels": Arg("labels", (6,)), "mixed_labels": Arg("labels", (6,))}
CASES = [
    Case(
        distill.distance_loss,
        {"logits": Arg("scores", (6, 3)), **LABELS, "distances": Arg("weights", (6, 2)), "where": Arg("where", (6,))},
        static={"power": 2},
        wrt=("logits",),
        frozen=("distances",),
        rows={"logits": 0, "labels": 0, "mixed_labels": 0, "distances": 0, "where": 0},
        symmetry="invariant",
    ),
    Case(distill.label_distances, {"logits": Arg("scores", (6, 3)), **LABELS}, wrt=("logits",), helper=True),
    Case(
        activation,
        {"features": Arg("activations", (3, 2, 2, 4)), "weights": Arg("scores", (4, 3)), "labels": Arg("labels", (3,))},
        wrt=("features", "weights"),
        helper=True,
        name="class_activation_map",
        covers=("distill.class_activation_map",),
    ),
    Case(
        refined,
        {"x": IMAGES, "activation": Arg("weights", (4, 4, 4))},
        wrt=("x",),
        frozen=("activation",),
        helper=True,
        name="refine_non_critical",
        covers=("distill.refine_non_critical",),
    ),
    Case(
        statistics,
        {"mean": Arg("scores", (3,)), "var": Arg("scores", (3,)), "running": Arg("scores", (3,))},
        wrt=("mean", "var"),
        frozen=("running",),
        helper=True,
        name="statistics_loss",
        covers=("distill.statistics_loss",),
    ),
    Case(
        distill.select_patches,
        {"activation": Arg("scores", (4, 3)), "confidence": Arg("scores", (4, 3)), "where": Arg("where", (4,))},
        static={"top": 2, "count": 5},
        reason="numbers of patches",
        helper=True,
    ),
    Case(distill.compose_grid, {"patches": IMAGES}, wrt=("patches",), helper=True),
    Case(
        mixed,
        {"seed": Arg("index", high=9), "x": IMAGES, "other": IMAGES},
        wrt=("x", "other"),
        helper=True,
        name="cutmix",
        covers=("distill.cutmix",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)
