"""Cauchy-Schwarz divergences against explicit sums over kernels, and against Gaussians, for which they are known."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)


def kernel(a, b, sigma):
    return float(np.exp(-((np.ravel(a) - np.ravel(b)) ** 2).sum() / (2 * sigma**2)))


def gram(a, b, sigma):
    return np.array([[kernel(v, w, sigma) for w in b] for v in a])


def conditional_oracle(x, y, h, sigma_x, sigma_y, norm):
    k = gram(x, x, sigma_x)
    w = k.sum(1) ** 2 if norm == "paper" else (k**2).sum(1)
    total = lambda a, b: sum((k[j] * gram(a, b, sigma_y)[j]).sum() / w[j] for j in range(len(x)))
    return np.log(total(y, y)) + np.log(total(h, h)) - 2 * np.log(total(h, y))


def information_oracle(x, t, sigma_x, sigma_t):
    k, q, n = gram(x, x, sigma_x), gram(t, t, sigma_t), len(x)
    joint, product = np.trace(k @ q.T) / n**2, k.sum() * q.sum() / n**4
    cross = (np.ones((1, n)) @ k.T @ q @ np.ones((n, 1))).item() / n**3
    return np.log(joint) + np.log(product) - 2 * np.log(cross)


def test_equals_the_sums():
    x, y, h, t = rng.normal(size=(7, 3)), rng.normal(size=7), rng.normal(size=7), rng.normal(size=(7, 2))
    where = np.array([1, 1, 0, 1, 1, 1, 0], bool)

    @jax.jit
    def run(x, y, h, t):
        width = {"sigma_x": 1.5, "sigma_y": 0.7, "where": where}
        return {
            "paper": information.conditional_cs_divergence(x, y, h, **width),
            "code": information.conditional_cs_divergence(x, y, h, norm="code", **width),
            "information": information.cs_mutual_information(x, t, **width),
            "normalised": information.cs_mutual_information(x, t, normalized=True, **width),
            "loss": information.cs_ib_loss(x, y, h, t, beta=0.3, sigma_t=0.7, **width),
            "divergence": information.cs_divergence(x[:, :2], t, sigma=0.7, where=where, kv_where=~where),
            "median": information.median_bandwidth(x, where=where),
        }

    dirty = [np.where(where.reshape(-1, *[1] * (v.ndim - 1)), v, np.nan) for v in (x, y, h)]
    with jax.enable_x64(True):
        got = run(*dirty, t)
    a, b = x[~where][:, :2] * np.nan, t[~where]
    x, y, h, u = x[where], y[where], h[where], t[where]
    paper = conditional_oracle(x, y, h, 1.5, 0.7, "paper")
    shared = information_oracle(x, u, 1.5, 0.7)
    ratio = shared / np.sqrt(information_oracle(x, x, 1.5, 1.5) * information_oracle(u, u, 0.7, 0.7))
    a = x[:, :2]
    between = np.log(gram(a, a, 0.7).mean()) + np.log(gram(b, b, 0.7).mean()) - 2 * np.log(gram(a, b, 0.7).mean())
    expected = {
        "paper": paper,
        "code": conditional_oracle(x, y, h, 1.5, 0.7, "code"),
        "information": shared,
        "normalised": ratio,
        "loss": paper + 0.3 * ratio,
        "divergence": between,
        "median": np.median([((x[i] - x[j]) ** 2).sum() for i in range(5) for j in range(i)]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)


def test_rows_over_shards_are_one_batch_in_value_and_gradient():
    x, y, h, t = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=8), rng.normal(size=(8, 2))
    data = [np.float32(v) for v in (x, y, h, t)] + [np.arange(8) < 7]

    def loss(h, t, split):
        x, y, _, _, where = data
        if not split:
            return information.cs_ib_loss(x, y, h, t, beta=0.5, where=where)
        parts = [v.reshape(2, 4, *v.shape[1:]) for v in (x, y, h, t, where)]
        spread = lambda x, y, h, t, w: information.cs_ib_loss(x, y, h, t, beta=0.5, where=w, axis_name="data")
        return jnp.mean(jax.vmap(spread, axis_name="data")(*parts))

    one, two = jax.jit(lambda h, t: [jax.value_and_grad(loss, (0, 1))(h, t, split) for split in (False, True)])(
        *data[2:4]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), two, one)


# In closed form: a kernel between two draws of N(0, S) has the mean det(I + 2 S / sigma^2)^(-1/2), and so on.
def gaussian_information(rho, sigma):
    cov = np.array([[1, rho], [rho, 1]])
    joint = np.linalg.det(np.eye(2) + 2 * cov / sigma**2) ** -0.5
    product = 1 / (1 + 2 / sigma**2)
    cross = np.linalg.det(np.eye(2) + cov / (sigma**2 + 1)) ** -0.5 / (1 + 1 / sigma**2)
    return np.log(joint) + np.log(product) - 2 * np.log(cross)


def gaussian_divergence(mean, scale, sigma):
    overlap = lambda var, gap: sigma / np.sqrt(sigma**2 + var) * np.exp(-(gap**2) / (2 * (sigma**2 + var)))
    return np.log(overlap(2, 0)) + np.log(overlap(2 * scale**2, 0)) - 2 * np.log(overlap(1 + scale**2, mean))


def test_gaussians_have_known_values():
    """Means over 16 samples lie near the truth: the pairs of a row with itself bias them by about 1 / N."""
    z = np.float32(rng.normal(size=(16, 3, 400)))
    rho = 0.8

    @jax.jit
    @jax.vmap
    def run(z):
        related = rho * z[0] + (1 - rho**2) ** 0.5 * z[1]
        shared = [information.cs_mutual_information(z[0], v, normalized=False) for v in (related, z[1])]
        return jnp.stack([*shared, information.cs_divergence(z[0], 1.5 + 0.5 * z[2])])

    dependent, independent, apart = np.asarray(run(z)).mean(axis=0)
    np.testing.assert_allclose(dependent, gaussian_information(rho, 1.0), rtol=0.05)
    assert 0 <= independent < 0.02 * dependent + 0.005
    np.testing.assert_allclose(apart, gaussian_divergence(1.5, 0.5, 1.0), rtol=0.05)


def test_properties():
    """Zero for perfect predictions, more for worse ones, one for a copy, and a gradient however far off they are."""
    x, y = np.float32(rng.normal(size=(12, 2))), np.float32(rng.normal(size=12))
    noise = np.float32(rng.normal(size=12))

    @jax.jit
    @jax.vmap
    def run(scale, size):
        loss = lambda h: information.conditional_cs_divergence(x, y, h)
        value, grad = jax.value_and_grad(loss)(y + scale * noise)
        kept = information.cs_mutual_information(x, size * x, normalized=True)
        return value, jnp.linalg.norm(grad), kept, information.cs_divergence(x, x)

    value, slope, kept, none = run(np.float32([0, 0.1, 1, 1e3]), np.float32([1, 1, 0, 0]))
    assert abs(value[0]) < 1e-6 and value[0] + 1e-3 < value[1] < value[2] < value[3]
    assert slope[3] > 1
    np.testing.assert_allclose(kept, [1, 1, 0, 0], rtol=1e-5)  # a constant code keeps nothing
    np.testing.assert_allclose(none, 0, atol=1e-6)


def test_attacks():
    x, w = np.float32(rng.normal(size=(3, 4))), np.float32(rng.normal(size=4))
    loss = lambda x: jnp.sum(jnp.square(x @ w - 1))
    once, often = jax.jit(lambda x: (information.fgsm(loss, x, eps=0.2), information.pgd(loss, x)))(x)
    side = np.sign((x @ w - 1)[:, None] * w[None])
    np.testing.assert_allclose(once, x + 0.2 * side, rtol=1e-6)
    moved = x.copy()
    for _ in range(5):
        moved = x + np.clip(moved + 0.05 * np.sign((moved @ w - 1)[:, None] * w[None]) - x, -0.3, 0.3)
    np.testing.assert_allclose(often, moved, rtol=1e-5)


def test_network_draws_codes_in_training_only():
    net = information.cs_ib_network(hidden=4, code=3, outputs=2, noise=True)
    x = np.float32(rng.normal(size=(5, 2)))

    @jax.jit
    def run(key):
        params = net.init(key, 2)
        quiet, loud = net.apply(params, x), net.apply(params, x, key=key, train=True)
        inside = x
        for i in range(3):
            layer = params["encoder"][f"dense_{i}"]
            inside = (jax.nn.relu(inside) if i else inside) @ layer["w"] + layer["b"][None]
        return quiet, loud, inside @ params["mean"]["w"] + params["mean"]["b"][None]

    (t, h), (noisy, _), expected = run(jax.random.key(0))
    assert h.shape == (5, 2)
    np.testing.assert_allclose(t, expected, rtol=1e-5)
    assert 0.05 < np.abs(noisy - t).mean() < 5
    with pytest.raises(ValueError, match="a key is needed"):
        jax.eval_shape(lambda key: net.apply(net.init(key, 2), x, train=True), jax.random.key(0))


def test_refuses():
    x, y = jnp.ones((4, 3)), jnp.ones(4)
    with pytest.raises(ValueError, match="norm='other'"):
        information.conditional_cs_divergence(x, y, y, norm="other")
    with pytest.raises(ValueError, match="predictions has shape"):
        information.conditional_cs_divergence(x, y, x)
    with pytest.raises(ValueError, match="sigma_x=0"):
        information.cs_mutual_information(x, y, sigma_x=0.0)
    with pytest.raises(ValueError, match="y has 3 rows, expected 4"):
        information.cs_mutual_information(x, y[:3])
    with pytest.raises(ValueError, match="kv_where has shape"):
        information.cs_divergence(x, x, kv_where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="beta=-1"):
        information.cs_ib_loss(x, y, y, x, beta=-1.0)
    with pytest.raises(ValueError, match="samples must be"):
        information.median_bandwidth(jnp.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="steps=0"):
        information.pgd(jnp.sum, x, steps=0)


def conditional(x, y, predictions, where, axis_name=None):
    return information.conditional_cs_divergence(x, y, predictions, where=where, axis_name=axis_name)


def loss(x, predictions, codes, where):
    return information.cs_ib_loss(x, x[:, 0], predictions, codes, where=where, beta=0.5)


def samples(a, b, where):
    return information.cs_divergence(a, b, where=where), information.median_bandwidth(a, where=where)


def attacked(x):
    return information.fgsm(lambda x: jnp.sum(x * x), x, eps=0.1), information.pgd(lambda x: jnp.sum(x * x), x)


def network(x):
    net = information.cs_ib_network(hidden=4, code=3)
    shapes = jax.eval_shape(lambda key: net.init(key, 4), jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(np.cos(np.arange(a.size)).reshape(a.shape), x.dtype), shapes)
    return net.apply(params, x)


ROWS, WHERE, SCORES = Arg("embeddings", (6, 3)), Arg("where", (6,)), Arg("scores", (6,))
ARGS = {"x": ROWS, "y": SCORES, "predictions": SCORES, "where": WHERE}
FROZEN = "attacks are constants, as documented"
CASES = [
    Case(conditional, ARGS, wrt=("y", "predictions"), rows=dict.fromkeys(ARGS, 0), symmetry="invariant",
         name="conditional_cs_divergence", covers=("information.conditional_cs_divergence",)),
    Case(loss, {"x": ROWS, "predictions": SCORES, "codes": ROWS, "where": WHERE}, wrt=("predictions", "codes"),
         helper=True, covers=("information.cs_ib_loss", "information.cs_mutual_information")),
    Case(samples, {"a": ROWS, "b": ROWS, "where": WHERE}, wrt=("a", "b"), helper=True,
         covers=("information.cs_divergence", "information.median_bandwidth")),
    Case(attacked, {"x": ROWS}, reason=FROZEN, helper=True, covers=("information.fgsm", "information.pgd")),
    Case(network, {"x": Arg("embeddings", (6, 4))}, wrt=("x",), helper=True, covers=("information.cs_ib_network",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
