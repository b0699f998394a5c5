"""Experts spread over eight devices against the layer on one, and the bytes that cross the axis."""

import math
import re

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Case
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab import moe
from jaxlab.types import RoutingPlan

rng = np.random.default_rng(0)
T, D, E, K, F = 48, 5, 8, 2, 4
MESHES = {
    "expert=8": {"expert": 8},
    "data=2,expert=4": {"data": 2, "expert": 4},
    "data=2,expert=2,model=2": {"data": 2, "expert": 2, "model": 2},
}


def start(layer, size, scale=1.0):
    draw = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda key: layer.init(key, size), jax.random.key(0))
    return jax.tree.map(lambda a: np.float32(draw.normal(size=a.shape) * scale), shapes)


def spread(axes, **options):
    """Returns the layer inside `shard_map` as a function of global parameters, tokens and mask."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    model = "model" if "model" in axes else None
    router = options.pop("router", moe.top_k_router(E, K))
    experts = moe.swiglu_experts(E, F, model_axis=model)
    layer = moe.moe_layer(router, experts, axis_name="expert", **options)
    by_hidden = {n: P("expert", *((model, None) if n == "down" else (None, model))) for n in ("gate", "up", "down")}
    rows = P(tuple(axis for axis in axes if axis != "model"))
    specs = ({"router": P(), "experts": by_hidden}, rows, rows)

    def local(p, x, where):
        y, plan = layer.apply(p, x, where=where)
        return y, plan.counts[None] if isinstance(plan, RoutingPlan) else jnp.zeros_like(y)

    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows), check_vma=True)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_spread_experts_equal_one_device(axes):
    """Values, and gradients outside the map, of every exchange; two experts are so busy that one round is too few."""
    one = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F))
    params = start(one, D)
    params["router"]["w"][:, 1:3] += 1
    x, where = rng.normal(size=(T, D)).astype(np.float32) + 0.5, np.arange(T) % 7 != 3
    forms = {"one": lambda p, x: one.apply(p, x, where=where)[0]}
    for name in ("all_to_all", "gather", "ring"):
        mapped = spread(axes, dispatch=moe.dropless(name, room=0.7))
        forms[name] = lambda p, x, mapped=mapped: mapped(p, x, where)[0]
    loss = lambda f: lambda p, x: (lambda y: (jnp.sum(jnp.sin(y)), y))(f(p, x))
    run = jax.jit(lambda p, x: {n: jax.value_and_grad(loss(f), (0, 1), has_aux=True)(p, x) for n, f in forms.items()})
    out = run(params, x)
    counts = np.asarray(spread(axes)(params, x, where)[1])
    devices = axes["expert"]
    block = math.ceil(0.7 * T // (8 // axes.get("model", 1)) * K / devices)
    assert counts.reshape(len(counts), devices, -1).sum(2).max() > block, "one round is enough: the test is too tame"
    for name in ("all_to_all", "gather", "ring"):
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name),
            out[name],
            out["one"],
        )


def test_buffers_and_slots_cross_the_axis_unchanged():
    """Each device's own buffers and slots: what the same layer without an axis gives for its tokens."""
    x, where = rng.normal(size=(T, D)).astype(np.float32), np.arange(T) % 7 != 3
    loss = lambda f: lambda p, x: (lambda y: (jnp.sum(jnp.sin(y)), y))(f(p, x))
    forms, params = {}, {}
    for name, router in (("buffers", moe.top_k_router(E, K)), ("slots", moe.soft_router(E, 2))):
        one = moe.moe_layer(router, moe.swiglu_experts(E, F), dispatch=moe.capacity(0.8))
        apart = jax.vmap(lambda p, x, w, one=one: one.apply(p, x, where=w)[0], (None, 0, 0))
        mapped = spread(MESHES["expert=8"], router=router, dispatch=moe.capacity(0.8))
        params[name] = start(one, D)
        forms[name] = (
            lambda p, x, f=apart: f(p, x.reshape(8, -1, D), where.reshape(8, -1)).reshape(x.shape),
            lambda p, x, f=mapped: f(p, x, where)[0],
        )
    run = lambda f, p, x: jax.value_and_grad(loss(f), (0, 1), has_aux=True)(p, x)
    out = jax.jit(lambda p, x: {n: tuple(run(f, p[n], x) for f in pair) for n, pair in forms.items()})(params, x)
    for one, mapped in out.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), mapped, one)


@pytest.mark.parametrize("room", [None, 0.3])
def test_any_number_of_rounds_under_a_mapped_axis_by_name(room):
    """`vmap` over an axis is a map too; rooms from a third of the mean block to all that can come."""
    one = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F))
    layer = moe.moe_layer(
        moe.top_k_router(E, K),
        moe.swiglu_experts(E, F),
        dispatch=moe.dropless("all_to_all", room=room),
        axis_name="expert",
    )
    params, x = start(one, D), rng.normal(size=(4, 6, D)).astype(np.float32)
    params["router"]["w"][:, 2] *= 3
    local = {**params, "experts": {n: w.reshape(4, 2, *w.shape[1:]) for n, w in params["experts"].items()}}
    over = jax.vmap(lambda p, x: layer.apply(p, x)[0], ({"router": None, "experts": 0}, 0), axis_name="expert")
    got, expected = jax.jit(lambda: (over(local, x), one.apply(params, x.reshape(-1, D))[0]))()
    np.testing.assert_allclose(got.reshape(-1, D), expected, rtol=1e-4, atol=1e-4)


def ragged_by_gathering(x, output, starts, sizes, targets, arriving, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, which CPUs lack: everyone sees all and takes its own."""
    index = jax.lax.axis_index(axis_name)
    rows, starts, sizes, targets = (jax.lax.all_gather(a, axis_name) for a in (x, starts, sizes, targets))
    for sender in range(rows.shape[0]):
        place = jnp.arange(rows.shape[1])
        real = place < sizes[sender, index]
        taken = rows[sender][jnp.minimum(starts[sender, index] + place, rows.shape[1] - 1)]
        target = jnp.where(real, targets[sender, index] + place, output.shape[0])
        output = output.at[target].set(taken, mode="drop")
    return output + 0 * jnp.sum(arriving).astype(output.dtype)


def test_ragged_blocks_have_the_right_places(monkeypatch):
    """Offsets and sizes against one device, by the stand-in; the collective and its transpose are in the trace."""
    one = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F))
    params, where = start(one, D), np.arange(T) % 7 != 3
    params["router"]["w"][:, 1:3] += 1
    x = rng.normal(size=(T, D)).astype(np.float32) + 0.5
    axes = MESHES["data=2,expert=4"]
    loss = lambda p, x: jnp.sum(spread(axes, dispatch=moe.dropless("ragged"))(p, x, where)[0])
    assert str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x)).count("ragged_all_to_all[") >= 4
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
    mapped = spread(axes, dispatch=moe.dropless("ragged"))
    got, expected = jax.jit(lambda p, x: (mapped(p, x, where)[0], one.apply(p, x, where=where)[0]))(params, x)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def crossing(text, operation):
    """Bytes of the results of an operation in the entry computation: what every step runs, whatever comes in."""
    entry = text[text.index("\nENTRY") :]
    entry, total = entry[: entry.index("\n}")], 0
    for line in entry.splitlines():
        found = re.search(rf"= (.*?) {operation}(?:-start)?\(", line)
        for dtype, shape in re.findall(r"([fs]32)\[([\d,]*)\]", found.group(1) if found else ""):
            total += 4 * math.prod(int(n) for n in shape.split(",")) if dtype else 0
    return total


@pytest.mark.optimised
def test_bytes_that_cross_the_expert_axis():
    """Rows there and back with the padding that is reported, and the counts; parameters once round the ring."""
    tokens, size, devices = 64, 32, 8
    x = jax.ShapeDtypeStruct((devices * tokens, size), jnp.float32)
    where = jax.ShapeDtypeStruct((devices * tokens,), bool)
    layer = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F))
    params = jax.eval_shape(lambda key: layer.init(key, size), jax.random.key(0))
    own = jax.tree.map(lambda a: jax.ShapeDtypeStruct((E // devices, *a.shape[1:]), a.dtype), params["experts"])
    stated = moe.exchange_bytes(
        own, jax.ShapeDtypeStruct((tokens, size), jnp.float32), num_experts=E, k=K, devices=devices
    )
    sent, padding = stated["all_to_all"]
    must_move = 2 * (devices - 1) * tokens * K // devices * size * 4
    assert sent - padding == must_move and padding == must_move // 4  # room = 1.25

    def compiled(exchange):
        form = spread(MESHES["expert=8"], dispatch=moe.dropless(exchange))
        return jax.jit(form).lower(params, x, where).compile().as_text()

    text = compiled("all_to_all")
    there_and_back = crossing(text, "all-to-all") * (devices - 1) // devices
    assert there_and_back == must_move + padding + (devices - 1) * E // devices * 4
    assert "conditional" in text and not crossing(text, "all-gather") and not crossing(text, "reduce-scatter")
    text = compiled("gather")
    x_bytes = tokens * size * 4
    plan_bytes = 3 * tokens * K * 4
    assert crossing(text, "all-gather") == devices * (x_bytes + plan_bytes)
    assert crossing(text, "reduce-scatter") == x_bytes and stated["gather"] == (2 * (devices - 1) * x_bytes, 0)


def test_auto_takes_what_sends_least():
    """Many tokens for small experts: the ring; few tokens with one expert each: blocks; with many: everything."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

    def cost(tokens, k, hidden):
        bytes_of = moe.exchange_bytes({"w": shape(2, hidden, 8)}, shape(tokens, 8), num_experts=16, k=k, devices=8)
        return min(("all_to_all", "gather", "ring"), key=lambda name: bytes_of[name][0])

    assert (cost(4096, 2, 8), cost(16, 1, 4096), cost(16, 8, 4096)) == ("ring", "all_to_all", "gather")


def test_refuses():
    layer = moe.moe_layer(moe.top_k_router(6, 1), moe.swiglu_experts(6, F), axis_name="expert")
    params = start(layer, D)
    with pytest.raises(ValueError, match="num_experts=6 must be a multiple of the 4 devices of 'expert'"):
        jax.vmap(lambda x: layer.apply(params, x)[0], axis_name="expert")(jnp.ones((4, 2, D)))


def exchange_bytes():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return moe.exchange_bytes({"w": shape(2, 4, 8)}, shape(16, 4), num_experts=8, k=2, devices=4)


CASES = [Case(exchange_bytes, {}, host=True, covers=("moe.exchange_bytes",))]
test_conformance = conformance.conformance_tests(CASES)
