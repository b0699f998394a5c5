"""Bures-Wasserstein batch normalisation against its algorithm in NumPy, one matrix after the other."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import norm

rng = np.random.default_rng(0)


def spd(*shape):
    """Random SPD matrices with eigenvalues well apart."""
    a = rng.normal(size=(*shape, shape[-1]))
    return a @ np.swapaxes(a, -1, -2) + 0.5 * np.eye(shape[-1])


def power_oracle(x, p):
    values, vectors = np.linalg.eigh(x)
    return (vectors * values**p) @ vectors.T


def root_of_product(a, b):
    """(ab)^1/2 as the principal root, by the eigenvectors of the product itself."""
    values, vectors = np.linalg.eig(a @ b)
    return np.real(vectors @ np.diag(np.sqrt(values)) @ np.linalg.inv(vectors))


def distance_oracle(x, y):
    return np.trace(x) + np.trace(y) - 2 * np.trace(root_of_product(x, y))


def lyapunov_oracle(b, c):
    n = len(b)
    system = np.kron(b, np.eye(n)) + np.kron(np.eye(n), b)
    return np.linalg.solve(system, c.ravel()).reshape(n, n)


def log_oracle(p, x):
    root = root_of_product(p, x)
    return root + root.T - 2 * p


def exp_oracle(p, v):
    half = lyapunov_oracle(p, v)
    return p + v + half @ p @ half


def transport_oracle(p, v, sign):
    """The square root of the linear map V -> (pV + Vp) / 2, as a matrix on vectors of n^2 entries."""
    n = len(p)
    mean = (np.kron(p, np.eye(n)) + np.kron(np.eye(n), p)) / 2
    return (power_oracle(mean, sign * 0.5) @ v.ravel()).reshape(n, n)


def statistics_oracle(x, power, about="identity"):
    g = np.mean(x, axis=0)
    root, inverse = power_oracle(g, 0.5), power_oracle(g, -0.5)
    middle = np.mean([power_oracle(root @ m @ root, 0.5) for m in x], axis=0)
    g = inverse @ middle @ middle @ inverse
    target = np.eye(len(g)) if about == "identity" else g
    return g, np.mean([distance_oracle(m, target) for m in x]) / power**2


def layer_oracle(x, bias, metric, scale, power=1.0, statistics=None, about="identity"):
    """Returns the normalised matrices and the statistics of the batch."""
    root, inverse = power_oracle(metric, 0.5), power_oracle(metric, -0.5)
    inner = np.array([inverse @ power_oracle(m, power) @ inverse for m in x])
    target = inverse @ power_oracle(bias, power) @ inverse
    g, var = statistics_oracle(inner, power, about) if statistics is None else statistics
    one, result = np.eye(x.shape[-1]), []
    for m in inner:
        centred = exp_oracle(one, transport_oracle(g, log_oracle(g, m), -1))
        scaled = exp_oracle(one, scale / np.sqrt(var + 1e-5) * log_oracle(one, centred))
        biased = exp_oracle(target, transport_oracle(target, log_oracle(one, scaled), 1))
        result.append(power_oracle(root @ biased @ root, 1 / power))
    return np.array(result), (g, var)


@pytest.mark.parametrize(("power", "about"), [(1.0, "identity"), (0.5, "mean")])
def test_equals_the_algorithm_in_training_and_test(power, about):
    layer = norm.spd_batch_norm(power=power, var_about=about, momentum=0.8)
    where = np.array([[1, 1, 0], [1, 1, 1]], bool)
    x = spd(2, 3, 3)
    dirty = np.where(where[..., None, None], x, np.nan)
    with jax.enable_x64(True):
        _, state = layer.init(jax.random.key(0), 3)
        params = {"spd_bias": jnp.asarray(spd(3)), "spd_metric": jnp.asarray(spd(3)), "scale": jnp.asarray(1.7)}
        state = {"mean": jnp.asarray(spd(3)), "var": jnp.asarray(2.0)}
        run = jax.jit(lambda s, x: (layer.apply(params, s, x, where=where, train=True), layer.apply(params, s, x)))
        (y, new), (tested, _) = run(state, dirty)[0], run(state, x)[1]
        p = {name: np.asarray(v) for name, v in params.items()}
        expected, (g, var) = layer_oracle(x[where], *p.values(), power=power, about=about)
        np.testing.assert_allclose(np.asarray(y)[where], expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_array_equal(y[0, 2], np.eye(3))
        a = np.asarray(state["mean"])
        root = root_of_product(a, g)
        np.testing.assert_allclose(new["mean"], 0.64 * a + 0.04 * g + 0.16 * (root + root.T), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(new["var"], 0.8 * 2.0 + 0.2 * var, rtol=1e-9)
        expected, _ = layer_oracle(x.reshape(-1, 3, 3), *p.values(), power=power, statistics=(a, 2.0))
        np.testing.assert_allclose(tested.reshape(-1, 3, 3), expected, rtol=1e-8, atol=1e-10)


def test_geometry():
    """Distance, both maps, geodesic, Lyapunov and the barycentre, each against its definition."""
    p, x, v = spd(4), spd(4), rng.normal(size=(4, 4))
    v = (v + v.T) / 10
    a, b = np.diag(np.exp(rng.normal(size=4))), np.diag(np.exp(rng.normal(size=4)))
    many, weights = spd(5, 3), rng.uniform(0.5, 2, 5)

    @jax.jit
    def run(p, x, v, many):
        left, right = jnp.stack([x, a, x, p, p]), jnp.stack([p, b, x, norm.bw_geodesic(p, x, 0.5), x])
        return {
            "distances": jnp.append(norm.bw_squared_distance(left, right), norm.bw_squared_distance(right[3], x)),
            "log": norm.bw_log(p, x),
            "back": jnp.stack([norm.bw_exp(p, norm.bw_log(p, x)), norm.bw_exp(None, norm.bw_log(None, x))]),
            "lyapunov": norm.lyapunov(p, v),
            "ends": jax.vmap(lambda t: norm.bw_geodesic(p, x, t))(jnp.array([0.0, 1.0])),
            "far": norm.bw_barycenter(many, steps=60, weights=jnp.asarray(weights)),
            "near": norm.bw_barycenter(many),
            "none": norm.bw_barycenter(many, where=np.zeros(5, bool)),
        }

    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, run(p, x, v, many))
    whole = distance_oracle(x, p)
    commuting = np.sum((np.sqrt(np.diag(a)) - np.sqrt(np.diag(b))) ** 2)
    expected = [whole, commuting, 0.0, whole / 4, whole, whole / 4]
    np.testing.assert_allclose(got["distances"], expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got["log"], log_oracle(p, x), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got["back"], [x, x], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got["lyapunov"], lyapunov_oracle(p, v), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["ends"], [p, x], rtol=1e-12)
    root = power_oracle(got["far"], 0.5)
    mean = sum(w * power_oracle(root @ m @ root, 0.5) for w, m in zip(weights, many, strict=True)) / weights.sum()
    np.testing.assert_allclose(mean, got["far"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(got["near"], statistics_oracle(many, 1)[0], rtol=1e-9)
    np.testing.assert_array_equal(got["none"], np.eye(3))


def test_layers_of_an_spd_network():
    x, positive = rng.normal(size=(4, 4)), spd(4)
    x, powers = x + x.T, (-1.5, -0.5, 0.5, 2.0)

    @jax.jit
    def run(x, positive):
        raised = [norm.spd_power(positive, p) for p in powers]
        return jnp.stack([norm.reeig(x, threshold=0.3), norm.spd_log(positive), *raised])

    with jax.enable_x64(True):
        got = run(x, positive)
    values, vectors = np.linalg.eigh(x)
    expected = [(vectors * np.maximum(values, 0.3)) @ vectors.T]
    values, vectors = np.linalg.eigh(positive)
    expected += [(vectors * np.log(values)) @ vectors.T, *(power_oracle(positive, p) for p in powers)]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
    layer = norm.bimap(2)
    params = layer.init(jax.random.key(0), 4)
    w = np.asarray(params["stiefel"], np.float64)
    np.testing.assert_allclose(w.T @ w, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(layer.apply(params, jnp.float32(positive)), w.T @ positive @ w, rtol=1e-5, atol=1e-5)


def test_gradients_equal_differences_for_equal_eigenvalues_too():
    """Every function of the spectrum in turn, at a matrix with distinct eigenvalues and at twice the identity."""
    points, other = np.stack([spd(3), 2 * np.eye(3)]), spd(3)
    v, h = (m + m.T for m in rng.normal(size=(2, 3, 3)))
    weights = rng.normal(size=(3, 3))
    layer = norm.spd_batch_norm()

    def functions(x):
        params = {"spd_bias": x, "spd_metric": x @ x, "scale": jnp.ones(())}
        state = {"mean": jnp.asarray(other), "var": jnp.asarray(1.5)}
        results = [
            norm.spd_power(x, 0.3), norm.spd_power(x, -0.5), norm.spd_log(x), norm.reeig(x, threshold=1.0),
            norm.lyapunov(x, v), norm.bw_log(x, other), norm.bw_exp(x, v / 20),
            layer.apply(params, state, other[None])[0][0],
        ]  # fmt: skip
        return jnp.sum(jnp.stack(results) * weights[None], axis=(1, 2))

    with jax.enable_x64(True):
        run = jax.jit(jax.vmap(lambda x: (functions(x), jax.jacrev(functions)(x))))
        step = 1e-5
        values, jacobians = run(np.concatenate([points, points + step * h, points - step * h]))
        exact = np.sum(np.asarray(jacobians)[:2] * h, axis=(2, 3))
        numeric = (np.asarray(values)[2:4] - np.asarray(values)[4:]) / (2 * step)
        np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=1e-7)


def test_equal_matrices_are_carried_onto_the_bias():
    layer = norm.spd_batch_norm()
    params, state = layer.init(jax.random.key(0), 3)
    params = {**params, "spd_bias": jnp.float32(spd(3))}
    x = jnp.broadcast_to(jnp.float32(spd(3)), (4, 3, 3))
    y, _ = layer.apply(params, state, x, train=True)
    np.testing.assert_allclose(y, np.broadcast_to(params["spd_bias"], y.shape), rtol=1e-3, atol=1e-3)


def test_riemannian_steps_stay_on_their_manifolds():
    params = {"spd_metric": spd(3), "stiefel": np.linalg.qr(rng.normal(size=(4, 2)))[0], "scale": np.ones(())}
    grads = {name: rng.normal(size=np.shape(v)) for name, v in params.items()}
    with jax.enable_x64(True):
        tx = norm.riemannian_sgd(0.05)
        updates, _ = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(params), jax.tree.map(jnp.asarray, params))
        new = {name: params[name] + np.asarray(u) for name, u in updates.items()}
    g, p = (grads["spd_metric"] + grads["spd_metric"].T) / 2, params["spd_metric"]
    np.testing.assert_allclose(new["spd_metric"], exp_oracle(p, -0.05 * p @ g @ p), rtol=1e-9, atol=1e-10)
    assert np.linalg.eigvalsh(new["spd_metric"]).min() > 0
    g, w = grads["stiefel"], params["stiefel"]
    np.testing.assert_allclose(new["stiefel"].T @ new["stiefel"], np.eye(2), atol=1e-12)
    moved = w - 0.05 * (g - w @ g.T @ w)  # the retraction keeps the span of the columns
    np.testing.assert_allclose(new["stiefel"] @ (new["stiefel"].T @ moved), moved, atol=1e-12)
    assert np.sum(new["stiefel"] * w, axis=0).min() > 0.9
    np.testing.assert_allclose(new["scale"], 1 - 0.05 * grads["scale"])


def test_refuses():
    x = jnp.ones((2, 3, 3))
    for options, message in (
        ({"power": 0}, "power=0"),
        ({"var_about": "zero"}, "var_about='zero'"),
        ({"momentum": 2}, "momentum=2"),
        ({"eps": -1.0}, "eps=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            norm.spd_batch_norm(**options)
    layer = norm.spd_batch_norm()
    params, state = layer.init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="x has shape"):
        layer.apply(params, state, x)
    with pytest.raises(ValueError, match="where has shape"):
        layer.apply(*layer.init(jax.random.key(0), 3), x, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"x must be \[..., n, n\]"):
        norm.spd_log(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="threshold=0"):
        norm.reeig(x, threshold=0)
    with pytest.raises(ValueError, match="features=5"):
        norm.bimap(5).init(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="steps=-1"):
        norm.bw_barycenter(x, steps=-1)
    with pytest.raises(ValueError, match="weights has shape"):
        norm.bw_barycenter(x, weights=jnp.ones(3))
    with pytest.raises(ValueError, match="learning_rate=0"):
        norm.riemannian_sgd(0)
    with pytest.raises(ValueError, match="params=None"):
        norm.riemannian_sgd(0.1).update({}, optax.EmptyState())


def covariance(a, where=None):
    """SPD matrices from any, so that the suite's random and extreme numbers are admissible; NaN under the mask."""
    if where is not None:
        a = jnp.where(where[:, None, None], a, 0.0)
    x = jnp.matmul(a, jnp.swapaxes(a, -1, -2)) + jnp.eye(a.shape[-1], dtype=a.dtype)[None]
    return x if where is None else jnp.where(where[:, None, None], x, jnp.nan)


def layer_case(a, where, axis_name=None):
    layer = norm.spd_batch_norm(axis_name=axis_name)
    params, state = layer.init(jax.random.key(0), 3)
    bias = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    return layer.apply({**params, "spd_bias": bias}, state, covariance(a, where), where=where, train=True)[0]


def layer_case_gradient(a, where):
    """Central differences of the algorithm in one matrix while the statistics stay where they were."""
    bias, one = np.diag([1.0, 2.0, 3.0]), np.eye(3)
    of = lambda a: a @ np.swapaxes(a, -1, -2) + one
    _, statistics = layer_oracle(of(a), bias, one, 1.0)
    weights = np.cos(np.arange(a.size) * 0.7).reshape(a.shape)  # how the suite weighs the outputs
    gradient = np.zeros_like(a)
    for i in np.ndindex(a.shape):
        values = []
        for sign in (1, -1):
            moved = a[i[0]].copy()
            moved[i[1:]] += sign * 1e-5
            y, _ = layer_oracle(of(moved)[None], bias, one, 1.0, statistics=statistics)
            values.append(np.sum(y[0] * weights[i[0]]))
        gradient[i] = (values[0] - values[1]) / 2e-5
    return {"a": gradient}


def pair_case(a, b):
    x, y = covariance(a), covariance(b)
    tangent = norm.bw_log(x, y)
    return (
        norm.bw_exp(x, tangent),
        norm.bw_geodesic(x, y, 0.3),
        norm.lyapunov(x, tangent),
        norm.bw_squared_distance(x, y),
    )


def single_case(a, w):
    x = covariance(a)
    mapped = norm.bimap(2).apply({"stiefel": w}, x)
    return norm.spd_log(x), norm.spd_power(x, 0.5), norm.reeig(x), mapped


def barycenter_case(a, where, axis_name=None):
    return norm.bw_barycenter(covariance(a, where), where=where, axis_name=axis_name)


def sgd_case(w, gradient):
    tx = norm.riemannian_sgd(0.1)
    params = {"stiefel": w}
    return tx.update({"stiefel": gradient}, tx.init(params), params)[0]["stiefel"]


MATRICES = Arg("activations", (6, 3, 3))
CASES = [
    Case(
        layer_case,
        {"a": MATRICES, "where": Arg("where", (6,))},
        wrt=("a",),
        rows={"a": 0, "where": 0},
        symmetry="equivariant",
        grad_oracle=layer_case_gradient,
        name="spd_batch_norm",
        covers=("norm.spd_batch_norm",),
        bfloat16_tolerance=0.3,
    ),
    Case(
        barycenter_case,
        {"a": MATRICES, "where": Arg("where", (6,))},
        wrt=("a",),
        rows={"a": 0, "where": 0},
        symmetry="invariant",
        name="bw_barycenter",
        covers=("norm.bw_barycenter",),
        helper=True,
    ),
    Case(
        pair_case,
        {"a": MATRICES, "b": Arg("activations", (6, 3, 3))},
        wrt=("a", "b"),
        name="bw_geometry",
        covers=("norm.bw_exp", "norm.bw_log", "norm.bw_geodesic", "norm.lyapunov", "norm.bw_squared_distance"),
        helper=True,
    ),
    Case(
        single_case,
        {"a": MATRICES, "w": Arg("activations", (3, 2))},
        wrt=("a", "w"),
        name="spd_layers",
        covers=("norm.spd_function", "norm.spd_log", "norm.spd_power", "norm.reeig", "norm.bimap"),
        helper=True,
    ),
    Case(
        sgd_case,
        {"w": Arg("activations", (4, 2)), "gradient": Arg("activations", (4, 2))},
        reason="an optimiser's step is not differentiated",
        name="riemannian_sgd",
        covers=("norm.riemannian_sgd",),
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)
