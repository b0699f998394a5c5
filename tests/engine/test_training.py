"""Ways to train the same thing: sharded parameters, accumulated gradients, less memory, fewer bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab import cli, nn
from jaxlab.engine import loop
from jaxlab.engine.mesh import state_shardings
from jaxlab.engine.recipes import MutualMoE
from jaxlab.types import Layer

SIZES = {"batch": 32, "width": 16, "depth": 1, "experts": 2, "hidden": 8, "heads": 2, "log_every": 1, "steps": 4}


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("training") / "plain"
    loop.train(MutualMoE(**SIZES), directory, quiet=True)
    return losses(directory)


@pytest.mark.parametrize("change", [{"shard": "fsdp", "mesh": "data=4"}, {"remat": "dots"}], ids=["fsdp", "remat"])
def test_the_numbers_stay(plain, tmp_path, change):
    loop.train(MutualMoE(**SIZES, **change), tmp_path / "run", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), plain, rtol=2e-3)


def test_bfloat16_learns_nearly_the_same(plain, tmp_path):
    loop.train(MutualMoE(**SIZES, compute="bfloat16"), tmp_path / "run", quiet=True)
    got = losses(tmp_path / "run")
    assert got != plain
    np.testing.assert_allclose(got, plain, rtol=0.05)


def test_fsdp_spreads_what_is_large_along_a_free_axis():
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    shapes = {"w": (6, 1000), "experts": {"w": (1, 4, 30, 64)}, "small": (8, 2), "odd": (33, 35)}
    state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    found = jax.tree.map(lambda s: s.spec, state_shardings(state, mesh, fsdp=True))
    assert found["w"] == P(None, "data") and found["experts"]["w"] == P(None, "expert", None, "data")
    assert found["small"] == P(None, None) and found["odd"] == P(None, None)
    assert all(s.spec == P(None, None) for s in (state_shardings(state, mesh)[n] for n in ("w", "small", "odd")))


def test_accumulated_gradients_are_those_of_the_larger_batch():
    recipe = MutualMoE(accumulate=3)
    tx, whole = recipe.accumulated(optax.adam(0.1)), optax.adam(0.1)
    params, grads = {"w": jnp.array([1.0, 2.0])}, np.float32([[1, 2], [3, -5], [2, 9]])
    state, moved = tx.init(params), params
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g)}, state, moved)
        moved = optax.apply_updates(moved, updates)
    updates, _ = whole.update({"w": jnp.asarray(grads.mean(0))}, whole.init(params), params)
    np.testing.assert_allclose(moved["w"], optax.apply_updates(params, updates)["w"], rtol=1e-6)


def test_parameters_and_gradients_keep_their_dtype():
    seen = []

    def apply(params, x):
        seen.append((params["w"].dtype, x.dtype))
        return x @ params["w"]

    net = nn.with_compute_dtype(Layer(lambda key: {"w": jnp.ones((3, 2))}, apply), "bfloat16")
    params, state = net.init(jax.random.key(0))
    grads = jax.grad(lambda p: net.apply(p, state, jnp.ones((4, 3)))[0].sum())(params)
    assert seen[0] == (jnp.bfloat16, jnp.bfloat16) and grads["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match="dtype=int32 must be"):
        nn.with_compute_dtype(net, "int32")


def test_a_profile_can_be_opened(tmp_path):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**SIZES, "steps": 8}.items()]
    assert cli.main(["train", "--run-dir", str(tmp_path / "run"), *arguments, "--profile", "--quiet"]) == 0
    written = {path.name for path in (tmp_path / "run" / "profile").rglob("*") if path.is_file()}
    assert "perfetto_trace.json.gz" in written and any(name.endswith(".xplane.pb") for name in written)


@pytest.mark.parametrize(
    "flag, message",
    [
        (("--compute", "float16"), "--compute must be float32 or bfloat16, got 'float16' (did you mean 'bfloat16'?)"),
        (("--shard", "fsd"), "did you mean 'fsdp'"),
        (("--remat", "all"), "--remat must be none, block or dots"),
        (("--accumulate", "0"), "--accumulate must be at least 1"),
    ],
)
def test_refuses(flag, message, tmp_path, capsys):
    assert cli.main(["train", "--run-dir", str(tmp_path / "run"), *flag]) == 2
    assert message in capsys.readouterr().err
