"""PowerNorm against the paper's recursion in NumPy, over warm-up and after it, in both forms of its backward."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import norm

rng = np.random.default_rng(0)
GAIN, BIAS = rng.normal(size=4) + 2, rng.normal(size=4)


def scaled_oracle(x, groups, eps):
    """Each token's groups of features by their root mean square, and a function that pulls gradients back."""
    y, size = np.zeros_like(x), x.shape[1] // groups
    for t in range(len(x)):
        for k in range(groups):
            part = slice(k * size, (k + 1) * size)
            y[t, part] = x[t, part] / np.sqrt(np.mean(x[t, part] ** 2) + eps)

    def pull(g):
        dx = np.zeros_like(x)
        for t in range(len(x)):
            for k in range(groups):
                part = slice(k * size, (k + 1) * size)
                root = np.sqrt(np.mean(x[t, part] ** 2) + eps)
                dx[t, part] = (g[t, part] - y[t, part] * np.mean(g[t, part] * y[t, part])) / root
        return dx

    return y, pull


class Recursion:
    """PowerNorm as its equations state it, one feature after the other, for tokens that all count."""

    def __init__(self, size, warmup, groups=None, denominator="running", momentum=0.9, eps=1e-5):
        self.phi, self.nu, self.t = np.ones(size), np.zeros(size), 0
        self.warmup, self.groups, self.denominator = warmup, groups, denominator
        self.momentum, self.eps = momentum, eps

    def step(self, x, dy, gain, bias):
        """Returns y, dL/dx, dL/dgain and dL/dbias, and moves on."""
        self.t += 1
        pull = lambda g: g
        if self.groups is not None:
            x, pull = scaled_oracle(x, self.groups, self.eps)
        y, dx, dgain = np.zeros_like(x), np.zeros_like(x), np.zeros(x.shape[1])
        for c in range(x.shape[1]):
            square = sum(v**2 for v in x[:, c]) / len(x)
            psi = np.sqrt((square if self.t <= self.warmup else self.phi[c]) + self.eps)
            unit = x[:, c] / psi
            y[:, c] = gain[c] * unit + bias[c]
            g = dy[:, c] * gain[c]
            below = np.sqrt(square + self.eps) if self.denominator == "batch" else psi
            dx[:, c] = (g - self.nu[c] * unit) / below
            dgain[c] = dy[:, c] @ unit
            gamma, lam = np.mean(unit**2), np.mean(g * unit)
            self.nu[c] = self.nu[c] * (1 - 0.1 * gamma) + 0.1 * lam
            if self.t < self.warmup:
                self.phi[c] = self.phi[c] * (self.t - 1) / self.t + square / self.t
            self.phi[c] = self.momentum * self.phi[c] + (1 - self.momentum) * square
        return y, pull(dx), dgain, dy.sum(0)


def stepper(layer):
    """One training step as a function of arrays: output, gradients, and the state with everything absorbed."""

    @jax.jit
    def step(params, state, x, dy, where=None):
        def run(params, state, x):
            return layer.apply(params, state, x, where=where, train=True)

        y, pull, new = jax.vjp(run, params, state, x, has_aux=True)
        dparams, change, dx = pull(dy)
        return y, dx, dparams, norm.absorb_nu(new, change)

    return step


@pytest.mark.parametrize(("denominator", "groups"), [("running", None), ("batch", 2)])
def test_equals_the_recursion_during_warm_up_and_after_it(denominator, groups):
    """Six steps, three of them warm-up; two of the ten tokens are padding and hold NaN."""
    layer = norm.power_norm(warmup_steps=3, groups=groups, denominator=denominator)
    step, oracle = stepper(layer), Recursion(4, 3, groups, denominator)
    where = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], bool)
    with jax.enable_x64(True):
        _, state = layer.init(jax.random.key(0), 4)
        params = {"gain": jnp.asarray(GAIN), "bias": jnp.asarray(BIAS)}
        state = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), state)
        for t in range(1, 7):
            x, dy = rng.normal(size=(2, 2, 5, 4)) * t
            dirty = np.where(where[..., None], x, np.nan)
            y, dx, dparams, state = step(params, state, dirty, np.where(where[..., None], dy, 9.0), where)
            expected = oracle.step(x[where], dy[where], GAIN, BIAS)
            np.testing.assert_allclose(np.asarray(y)[where], expected[0], rtol=1e-10)
            np.testing.assert_allclose(np.asarray(dx)[where], expected[1], rtol=1e-9, atol=1e-12)
            assert not np.any(np.asarray(dx)[~where]) and not np.any(np.asarray(y)[~where])
            np.testing.assert_allclose(dparams["gain"], expected[2], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(dparams["bias"], expected[3], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(state["phi"], oracle.phi, rtol=1e-10)
            np.testing.assert_allclose(state["nu"], oracle.nu, rtol=1e-10, atol=1e-13)
            assert state["step"] == t
        x = rng.normal(size=(6, 4))
        y, same = layer.apply(params, state, x)
        unit = (x if groups is None else scaled_oracle(x, groups, 1e-5)[0]) / np.sqrt(oracle.phi + 1e-5)
        np.testing.assert_allclose(y, GAIN * unit + BIAS, rtol=1e-10)
        assert same is state


def test_without_a_correction_the_gradient_is_that_of_a_scaling():
    layer = norm.power_norm(warmup_steps=0, groups=None, backward_momentum=1.0)
    params, state = layer.init(jax.random.key(0), 4)
    state = {**state, "phi": jnp.float32([1.0, 4.0, 9.0, 0.25])}
    x, dy = np.float32(rng.normal(size=(2, 6, 4)))
    _, dx, _, new = stepper(layer)(params, state, x, dy)
    np.testing.assert_allclose(dx, dy / np.sqrt(np.asarray(state["phi"]) + 1e-5), rtol=1e-5)
    assert not np.any(new["nu"])


def test_nu_stays_bounded_and_settles_where_the_projected_gradient_is():
    """With the same batch again and again nu becomes Lambda / Gamma, and dx is orthogonal to xhat as in PN-V."""
    layer = norm.power_norm(warmup_steps=0, groups=None)
    params, state = layer.init(jax.random.key(0), 4)
    x, dy = np.float32(rng.normal(size=(2, 6, 4)))
    step = stepper(layer)
    bound = np.abs(dy * x).max() / 0.1
    for _ in range(200):
        y, dx, _, state = step(params, state, x, dy)
        assert np.abs(state["nu"]).max() <= bound
    np.testing.assert_allclose(state["phi"], (x**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(state["nu"], (dy * y).mean(0) / (y**2).mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.sum(dx * y, axis=0), 0, atol=1e-4)
    plain = norm.power_norm_v(groups=None)
    expected = jax.grad(lambda x: jnp.sum(plain.apply(*plain.init(jax.random.key(0), 4), x, train=True)[0] * dy))(x)
    np.testing.assert_allclose(dx, expected, atol=1e-3)


def test_shards_together_take_the_step_of_the_whole_batch(mesh8):
    """Value, gradients and the change of nu, differentiated outside the map, with an uneven mask."""
    params, state = norm.power_norm().init(jax.random.key(0), 4)
    state = {"phi": jnp.float32([1, 2, 3, 4]), "nu": jnp.float32(rng.normal(size=4)), "step": jnp.float32(9)}
    x, dy = np.float32(rng.normal(size=(2, 16, 4)))
    where = np.arange(16) < 13

    def outcome(form):
        def loss(params, state, x):
            y, new = form(params, state, x)
            return jnp.sum(y * dy), new

        grads, new = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, state, x)
        return grads, norm.absorb_nu(new, grads[1])

    local = norm.power_norm(warmup_steps=5)
    spread = norm.power_norm(warmup_steps=5, axis_name="data")
    expected = outcome(lambda p, s, x: local.apply(p, s, x, where=jnp.asarray(where), train=True))
    for check in (True, False):
        mapped = jax.shard_map(
            lambda p, s, x, w: spread.apply(p, s, x, where=w, train=True),
            mesh=mesh8,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=(P("data"), P()),
            check_vma=check,
        )
        got = outcome(lambda p, s, x, mapped=mapped: mapped(p, s, x, jnp.asarray(where)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_a_batch_without_tokens_changes_nothing():
    layer = norm.power_norm(warmup_steps=2)
    params, state = layer.init(jax.random.key(0), 4)
    state = {"phi": jnp.full(4, 3.0), "nu": jnp.full(4, 0.5), "step": jnp.float32(1)}
    y, dx, _, new = stepper(layer)(params, state, np.full((5, 4), np.nan, np.float32), np.ones((5, 4), np.float32),
                                   np.zeros(5, bool))  # fmt: skip
    assert not np.any(y) and not np.any(dx)
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_changes_reach_the_layers_of_a_network_and_nothing_else():
    one = {"phi": jnp.ones(2), "nu": jnp.zeros(2), "step": jnp.zeros(())}
    state = {"layers": [one, {"nu": jnp.ones(2)}], "mean": jnp.ones(2)}
    new = norm.absorb_nu(state, jax.tree.map(lambda a: a + 5, state))
    assert new["layers"][0]["nu"].tolist() == [5, 5] and new["layers"][0]["phi"].tolist() == [1, 1]
    assert new["layers"][1]["nu"].tolist() == [1, 1] and new["mean"].tolist() == [1, 1]


def test_plain_variant_equals_the_loop():
    x = rng.normal(size=(7, 4)) * 3
    plain = norm.power_norm_v(groups=2, momentum=0.8)
    params, state = plain.init(jax.random.key(0), 4)
    y, new = plain.apply(params, state, jnp.float32(x), train=True)
    scaled, _ = scaled_oracle(x, 2, 1e-5)
    square = (scaled**2).mean(0)
    np.testing.assert_allclose(y, scaled / np.sqrt(square + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(new["phi"], 0.8 + 0.2 * square, rtol=1e-5)
    y, _ = plain.apply(params, new, jnp.float32(x))
    np.testing.assert_allclose(y, scaled / np.sqrt(0.8 + 0.2 * square + 1e-5), rtol=1e-5)


def test_distance_of_statistics():
    a, b = rng.normal(size=(2, 3, 5))
    expected = [np.sqrt(sum((u - v) ** 2 for u, v in zip(x, y, strict=True))) / 5 for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(norm.batch_statistic_distance(jnp.float32(a), jnp.float32(b)), expected, rtol=1e-5)


def test_refuses():
    x = jnp.ones((2, 4))
    layer = norm.power_norm(groups=3)
    with pytest.raises(ValueError, match="groups=3 must divide the 4"):
        layer.init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="groups=3 must divide the 4"):
        norm.group_scaling(x, 3)
    for options, message in (
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"denominator": "both"}, "denominator='both'"),
        ({"backward_momentum": 2}, "backward_momentum=2"),
        ({"momentum": -1}, "momentum=-1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"groups": 0}, "groups=0"),
    ):
        with pytest.raises(ValueError, match=message):
            norm.power_norm(**options)
    layer = norm.power_norm()
    params, state = layer.init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="x has shape"):
        layer.apply(params, state, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="where has shape"):
        layer.apply(params, state, x, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="must have one shape"):
        norm.batch_statistic_distance(x, jnp.ones(4))


def case(x, where, nu, axis_name=None):
    """A step after warm-up, as a function of the tokens and of nu, whose gradient is its change."""
    layer = norm.power_norm(warmup_steps=0, groups=None, axis_name=axis_name)
    params, state = layer.init(jax.random.key(0), 4)
    phi = jnp.arange(1.0, 5.0, dtype=state["phi"].dtype)
    return layer.apply(params, {**state, "phi": phi, "nu": nu}, x, where=where, train=True)[0]


def case_gradient(x, where, nu):
    oracle = Recursion(4, 0)
    oracle.phi, oracle.nu = np.arange(1.0, 5.0), nu.copy()
    dy = np.cos(np.arange(x.size) * 0.7).reshape(x.shape)  # how the suite weighs the outputs
    _, dx, _, _ = oracle.step(x, dy, np.ones(4), np.zeros(4))
    return {"x": dx, "nu": oracle.nu - nu}


def plain_case(x, where, axis_name=None):
    layer = norm.power_norm_v(axis_name=axis_name)
    params, state = layer.init(jax.random.key(0), 4)
    return layer.apply(params, state, x, where=where, train=True)[0]


def absorb_case(nu, change):
    rest = {"phi": jnp.ones_like(nu), "step": jnp.zeros((), nu.dtype)}
    return norm.absorb_nu({"nu": nu, **rest}, {"nu": change, **rest})["nu"]


TOKENS = {"x": Arg("activations", (6, 4)), "where": Arg("where", (6,))}
CASES = [
    Case(
        case,
        {**TOKENS, "nu": Arg("scores", (4,))},
        wrt=("x", "nu"),
        rows={"x": 0, "where": 0},
        symmetry="equivariant",
        grad_oracle=case_gradient,
        name="power_norm",
        covers=("norm.power_norm",),
    ),
    Case(
        plain_case,
        TOKENS,
        wrt=("x",),
        rows={"x": 0, "where": 0},
        symmetry="equivariant",
        name="power_norm_v",
        covers=("norm.power_norm_v",),
    ),
    Case(
        absorb_case,
        {"nu": Arg("scores", (4,)), "change": Arg("scores", (4,))},
        wrt=("nu", "change"),
        name="absorb_nu",
        covers=("norm.absorb_nu",),
        helper=True,
    ),
    Case(norm.group_scaling, {"x": Arg("activations", (6, 4))}, static={"groups": 2}, wrt=("x",), rows={"x": 0},
         symmetry="equivariant", helper=True),
    Case(
        norm.batch_statistic_distance,
        {"batch": Arg("activations", (6, 4)), "running": Arg("activations", (6, 4))},
        wrt=("batch", "running"),
        rows={"batch": 0, "running": 0},
        symmetry="equivariant",
        helper=True,
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
