"""Losses on bag means against loops and their identity, the closed form, the limits and the private mechanism."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil

rng = np.random.default_rng(0)
KEEP = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
F, Y = np.where(KEEP, rng.normal(size=(4, 4)), np.nan), rng.normal(size=4)
Y[2] = np.nan
ORDER = rng.permutation(16)
LIST = {"segment_ids": np.where(KEEP, np.arange(4)[:, None], -1).reshape(-1)[ORDER], "num_segments": 4}
LOSSES = {
    "squared": ("squared", lambda y, f: (y - f) ** 2),
    "absolute": (lambda y, f: jnp.abs(y - f), lambda y, f: abs(y - f)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_loop_in_both_layouts(name):
    loss, each = LOSSES[name]
    rows = [F[b][KEEP[b]] for b in (0, 1, 3)]
    bag = [each(Y[b], f.mean()) for b, f in zip((0, 1, 3), rows, strict=True)]
    instance = [np.mean([each(Y[b], v) for v in f]) for b, f in zip((0, 1, 3), rows, strict=True)]
    f, y = jnp.float32(F), jnp.float32(Y)

    def run(f, y):
        forms = []
        for values, layout in ((f, {"where": KEEP}), (f.reshape(-1)[ORDER], LIST)):
            options = {"loss": loss, **layout}
            forms.append(
                (
                    mil.bag_loss(values, y, **options),
                    mil.instance_loss(values, y, **options),
                    mil.interpolated_loss(values, y, rho=0.3, **options),
                    mil.within_bag_variance(values, **layout),
                    mil.interpolated_loss(values, y, rho=2.0, reduction="none", **options),
                )
            )
        return forms

    for got in jax.jit(run)(f, y):
        np.testing.assert_allclose(got[0], np.mean(bag), rtol=1e-5)
        np.testing.assert_allclose(got[1], np.mean(instance), rtol=1e-5)
        np.testing.assert_allclose(got[2], 0.7 * np.mean(bag) + 0.3 * np.mean(instance), rtol=1e-5)
        np.testing.assert_allclose(got[3], np.mean([f.var() for f in rows]), rtol=1e-5)
        np.testing.assert_allclose(np.asarray(got[4])[[0, 1, 3]], 2 * np.array(instance) - np.array(bag), rtol=1e-4)
        assert got[4][2] == 0
        if name == "squared":  # the lemma, and Jensen's inequality for the other
            np.testing.assert_allclose(got[1], got[0] + got[3], rtol=1e-5)
        assert got[1] >= got[0]


def test_closed_form_minimises_the_loss_and_is_least_squares_at_one():
    with jax.enable_x64(True):
        x, y = rng.normal(size=(6, 5, 3)), rng.normal(size=6)
        keep = np.ones((6, 5), bool)

        def run(x, y):
            def loss(theta):
                return mil.interpolated_loss(x @ theta, y, rho=0.4, where=keep) + 0.1 * jnp.sum(theta**2)

            theta = mil.linear_interpolated_estimator(x, y, rho=0.4, ridge=0.1, where=keep)
            flat = x.reshape(-1, 3)
            ids = jnp.repeat(jnp.arange(6), 5)
            listed = mil.linear_interpolated_estimator(flat, y, rho=1.0, segment_ids=ids, num_segments=6)
            return jax.grad(loss)(theta), listed

        gradient, listed = jax.jit(run)(x, y)
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
        # At rho = 1 every instance is given the response of its bag.
        expected = np.linalg.lstsq(x.reshape(-1, 3), np.repeat(y, 5), rcond=None)[0]
        np.testing.assert_allclose(listed, expected, rtol=1e-9)


def test_fewer_bags_than_features_take_the_least_norm():
    x, y = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=2).astype(np.float32)
    got = jax.jit(lambda x, y: mil.linear_interpolated_estimator(x, y, rho=0.0))(x, y)
    np.testing.assert_allclose(got, np.linalg.pinv(x.mean(1)) @ y, rtol=1e-3, atol=1e-4)


def test_shrinkage_and_risk_of_random_gaussian_bags():
    """Many examples for the limit; for the risk, 300 draws of 40 bags of 10 features."""
    theta = np.ones(4, np.float32)

    def shrunk(key):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (4000, 5, 4))
        y = jnp.mean(x @ theta, axis=1) + 0.1 * jax.random.normal(keys[1], (4000,))
        return mil.linear_interpolated_estimator(x, y, rho=0.5)

    expected = mil.population_shrinkage(0.5, 5)
    np.testing.assert_allclose(expected, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(shrunk)(jax.random.key(0)), expected * theta, rtol=0.05)

    def missed(key):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (40, 3, 10))
        y = jnp.mean(jnp.sum(x, -1) + 2 * jax.random.normal(keys[1], (40, 3)), axis=1)
        return jnp.sum((mil.linear_interpolated_estimator(x, y, rho=0.0, ridge=1e-9) - 1) ** 2)

    risks = jax.jit(jax.vmap(missed))(jax.random.split(jax.random.key(1), 300))
    np.testing.assert_allclose(risks.mean(), mil.bag_risk(10, 40, 4.0), rtol=0.1)
    assert np.isinf(mil.bag_risk(10, 11, 1.0))


def test_private_means():
    y = np.array([[9.0, 0.5, -0.5, 7.0], [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], [5, -9, 5, 5]], np.float32)
    clean = np.zeros(4)
    for b in (0, 1, 3):
        clean[b] = np.clip(y[b][KEEP[b]], -3, 3).mean()
    draw = jax.jit(jax.vmap(lambda key: mil.dp_aggregate(key, y, epsilon=0.5, clip=3.0, where=KEEP)))
    got = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(np.median(got, 0), clean, atol=0.6)
    for b in (0, 1, 3):  # a Laplace variable's mean distance from its centre is its scale
        np.testing.assert_allclose(np.abs(got[:, b] - clean[b]).mean(), 2 * 3 / (0.5 * KEEP[b].sum()), rtol=0.06)
    assert not got[:, 2].any()
    # One response changes one mean by at most 2 C / k: with the same noise, exactly by that.
    other = y.copy()
    other[1, 0] = -100
    key = jax.random.key(1)
    two = [mil.dp_aggregate(key, v, epsilon=0.5, clip=3.0, where=KEEP) for v in (y, other)]
    change = np.abs(np.asarray(two[0] - two[1]))
    assert change[1] <= 2 * 3 / 4 and not change[[0, 2, 3]].any()


def test_risk_of_private_bags_is_that_of_the_formula():
    """Bias and variance of 400 draws of 400 bags of 4, each within a tenth, for two weights."""
    theta = np.full(5, 0.5, np.float32)

    def fitted(key, rho):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (400, 4, 5))
        y = x @ theta + 2 * jax.random.normal(keys[1], (400, 4))
        private = mil.dp_aggregate(keys[2], y, epsilon=20.0, clip=30.0)
        return mil.linear_interpolated_estimator(x, private, rho=rho, ridge=1e-9)

    draw = jax.jit(jax.vmap(fitted, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 400)
    for rho in (0.3, 1.0):
        got = np.asarray(draw(keys, jnp.float32(rho)))
        options = {"signal": 1.25, "noise_variance": 4.0, "clip": 30.0, "epsilon": 20.0, "sizes": [4], "rho": rho}
        risk = float(mil.optimal_bag_size(1600, 5, **options)[1][0])
        bias = (1 - 1 / (1 + 3 * rho)) ** 2 * 1.25
        np.testing.assert_allclose(np.sum((got.mean(0) - theta) ** 2), bias, rtol=0.1)
        np.testing.assert_allclose(got.var(0).sum(), risk - bias, rtol=0.1)


def test_best_bag_size():
    options = {"signal": 1.0, "noise_variance": 2.0, "clip": 3.0, "sizes": (1, 2, 5, 10, 100)}
    best, risks = mil.optimal_bag_size(2000, 20, epsilon=0.2, **options)
    assert best == options["sizes"][int(np.argmin(risks))] > 1
    assert mil.optimal_bag_size(2000, 20, epsilon=float("inf"), **options)[0] == 1
    assert mil.optimal_bag_size(2000, 20, epsilon=0.2, rho=0.0, **options)[0] == 1


def test_random_bags_are_of_one_size():
    ids = np.asarray(mil.random_bags(jax.random.key(0), 23, 5))
    np.testing.assert_array_equal(np.bincount(ids + 1), [3, 5, 5, 5, 5])
    assert np.any(ids[:5] != ids[0])


def test_refuses():
    f, y = jnp.ones((3, 4)), jnp.ones(3)
    with pytest.raises(ValueError, match="responses has shape"):
        mil.bag_loss(f, jnp.ones(4))
    with pytest.raises(ValueError, match="loss='huber'"):
        mil.bag_loss(f, y, loss="huber")
    with pytest.raises(ValueError, match="one number an instance"):
        mil.within_bag_variance(jnp.ones(3))
    with pytest.raises(ValueError, match="ridge=-1"):
        mil.linear_interpolated_estimator(f[..., None], y, rho=0.5, ridge=-1)
    with pytest.raises(ValueError, match="epsilon=0"):
        mil.dp_aggregate(jax.random.key(0), f, epsilon=0, clip=1.0)
    with pytest.raises(ValueError, match="bag_size=9 must be between"):
        mil.random_bags(jax.random.key(0), 5, 9)
    with pytest.raises(ValueError, match="sizes"):
        mil.optimal_bag_size(10, 2, signal=1.0, noise_variance=1.0, clip=1.0, epsilon=1.0, sizes=[])


BAGS = {"predictions": Arg("scores", (3, 6)), "where": Arg("where", (3, 6))}
CASES = [
    Case(mil.interpolated_loss, {"predictions": Arg("scores", (6, 3)), "responses": Arg("scores", (6,))},
         static={"rho": 0.4}, wrt=("predictions", "responses"), rows={"predictions": 0, "responses": 0},
         symmetry="invariant"),
    Case(lambda predictions, responses, where: mil.interpolated_loss(predictions, responses, rho=0.4, where=where),
         {**BAGS, "responses": Arg("scores", (3,))}, wrt=("predictions",), helper=True,
         name="interpolated_loss, masked"),
    Case(lambda predictions, responses: mil.bag_loss(predictions, responses), {"predictions": Arg("scores", (3, 4)),
         "responses": Arg("scores", (3,))}, wrt=("predictions",), helper=True, name="bag_loss",
         covers=("mil.bag_loss",)),
    Case(lambda predictions, responses: mil.instance_loss(predictions, responses), {
         "predictions": Arg("scores", (3, 4)), "responses": Arg("scores", (3,))}, wrt=("predictions",), helper=True,
         name="instance_loss", covers=("mil.instance_loss",)),
    Case(lambda predictions, where: mil.within_bag_variance(predictions, where=where), BAGS, wrt=("predictions",),
         helper=True, name="within_bag_variance",
         covers=("mil.within_bag_variance",)),
    Case(mil.linear_interpolated_estimator, {"x": Arg("embeddings", (3, 6, 2)), "responses": Arg("scores", (3,)),
         "where": Arg("where", (3, 6))}, static={"rho": 0.5, "ridge": 0.1}, wrt=("x", "responses"), helper=True,
         bfloat16_tolerance=0.2),
    Case(mil.dp_aggregate, {"key": Arg("key"), "responses": Arg("scores", (3, 4)), "where": Arg("where", (3, 4))},
         static={"epsilon": 1.0, "clip": 2.0}, wrt=("responses",), helper=True),
    Case(mil.random_bags, {"key": Arg("key")}, static={"num_examples": 8, "bag_size": 3}, helper=True),
    Case(lambda rho: mil.population_shrinkage(rho, 3), {"rho": Arg("weights")}, wrt=("rho",), helper=True,
         name="population_shrinkage", covers=("mil.population_shrinkage",)),
    Case(lambda noise: mil.bag_risk(3, 9, noise) + mil.optimal_bag_size(
             90, 3, signal=1.0, noise_variance=noise, clip=1.0, epsilon=1.0, sizes=(1, 2))[1][0],
         {"noise": Arg("weights")}, wrt=("noise",), helper=True, name="risks",
         covers=("mil.bag_risk", "mil.optimal_bag_size")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
