"""The conformance suite: what every public function must survive.

A test file declares its cases and turns them into tests in one line:

    CASES = [
        Case(
            groco_loss,
            args={"anchor": Arg("embeddings", (6, 8)), "where": Arg("where", (6,)), ...},
            static={"k": 3},
            wrt=("anchor",),                      # floating arguments that carry gradient
            frozen=("positives",),                # floating arguments whose gradient must be exactly zero
            rows={"anchor": 0, "positives": 0, "where": 0},   # which axis of which argument counts the examples
            symmetry="invariant",                 # of a permutation of the rows: "invariant", "equivariant", None
        ),
    ]
    test_conformance = conformance_tests(CASES)

Arguments are passed by name. `Arg(role, shape, high=...)` draws the data; roles: `embeddings scores probabilities
labels where weights key activations index`. For an equivariant function, axis 0 of every output counts the rows. An
invariant is switched off only by `skip={"name": "reason"}`; the names are the functions below that start with `check_`.

A `Layer`, a `Learner` or an optax transformation is wrapped in a function of named arrays; then
`covers=("norm.power_norm",)` says which public names the case stands for (a public function of its own is found by
itself). `host=True` is for work on the host (NumPy arrays and callables): same inputs, same result, no input changed.

A case compiles at most 8 executables: random inputs, extremes, masks and permutations are stacked and go through one
vmapped `value_and_grad`. Eager execution, which compiles operation by operation, is not counted; it costs seconds, so
only the first full case of a file has it, while for every case two traces have to give the same program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

MAX_EXECUTABLES = 8
DEVICES = 8
FLOATING = ("embeddings", "scores", "probabilities", "weights", "activations")


@dataclasses.dataclass(frozen=True)
class Arg:
    """One argument: what it means, its shape, and for labels and indices the first value that is out of range."""

    role: str
    shape: tuple[int, ...] = ()
    high: int = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One public function under the suite; see the module docstring."""

    function: Callable[..., Any]
    args: dict[str, Arg]
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrt: tuple[str, ...] = ()
    reason: str = ""
    frozen: tuple[str, ...] = ()
    grad_oracle: Callable[..., Any] | None = None
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    symmetry: str | None = None
    skip: dict[str, str] = dataclasses.field(default_factory=dict)
    name: str = ""
    helper: bool = False
    host: bool = False
    eager: bool = False
    covers: tuple[str, ...] = ()
    bfloat16_tolerance: float = 0.1

    @property
    def label(self) -> str:
        return self.name or getattr(self.function, "__name__", "function")


def draw(arg: Arg, seed: int, dtype=np.float32) -> Any:
    """Draws one argument from its role."""
    rng = np.random.default_rng([seed, len(arg.shape), sum(arg.shape)])
    if arg.role == "key":
        return jax.random.key(seed)
    if arg.role in ("labels", "index"):
        return rng.integers(0, arg.high, arg.shape).astype(np.int32)
    if arg.role == "where":
        return np.ones(arg.shape, bool)
    x = rng.normal(size=arg.shape)
    if arg.role == "probabilities":
        x = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    elif arg.role == "weights":
        x = np.abs(x)
    elif arg.role not in FLOATING:
        raise ValueError(f"unknown role {arg.role!r}")
    return np.asarray(x, dtype)


def inputs(case: Case, seed: int, dtype=np.float32) -> dict[str, Any]:
    return {name: draw(arg, seed + i * 101, dtype) for i, (name, arg) in enumerate(case.args.items())}


def extremes(case: Case) -> list[dict[str, Any]]:
    """Inputs at the edge: equal, huge, zero, identical rows, certain probabilities, one example, none."""
    base = inputs(case, 7)

    def change(roles, f):
        return {n: f(v) if case.args[n].role in roles else v for n, v in base.items()}

    def one_hot(v):
        return np.eye(v.shape[-1], dtype=v.dtype)[np.zeros(v.shape[:-1], int)] if v.ndim else np.ones_like(v)

    rows = [
        change(("embeddings", "scores", "activations"), np.zeros_like),
        change(("embeddings", "scores", "activations"), lambda v: v * np.float32(1e4)),
        change(("scores",), np.ones_like),
        change(("embeddings", "activations"), lambda v: np.broadcast_to(v.reshape(-1, v.shape[-1])[0], v.shape).copy()),
        change(("probabilities",), one_hot),
        change(("weights",), np.zeros_like),
        change(("labels",), np.zeros_like),
        change(("where",), np.zeros_like),
    ]
    if any(a.role == "where" for a in case.args.values()):
        rows.append(change(("where",), lambda v: np.arange(v.size).reshape(v.shape) == 0))
    return rows


def with_where(case: Case, values: dict[str, Any], keep: np.ndarray) -> dict[str, Any]:
    return {n: np.broadcast_to(keep, v.shape).copy() if case.args[n].role == "where" else v for n, v in values.items()}


def fill_rows(case: Case, values: dict[str, Any], rows: np.ndarray, value: float) -> dict[str, Any]:
    """Writes `value` into the given rows of every floating argument that has rows."""
    result = dict(values)
    for name, axis in case.rows.items():
        if case.args[name].role in FLOATING:
            moved = np.moveaxis(np.array(values[name]), axis, 0)
            moved[rows] = value
            result[name] = np.moveaxis(moved, 0, axis)
    return result


def permute_rows(case: Case, values: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    return {n: np.take(v, order, axis=case.rows[n]) if n in case.rows else v for n, v in values.items()}


def row_count(case: Case) -> int:
    name, axis = next(iter(case.rows.items()))
    return case.args[name].shape[axis]


def stack(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks on the host, because each eager operation would be a program of its own."""
    return jax.tree.map(lambda *v: jnp.stack(v) if isinstance(v[0], jax.Array) else np.stack(v), *values)


class Runner:
    """The compiled forms of one case, each made at most once."""

    def __init__(self, case: Case):
        self.case = case
        self.traces = 0
        self.eager = 0

    def call(self, values: dict[str, Any], **extra) -> Any:
        self.traces += 1
        return self.case.function(**values, **self.case.static, **extra)

    def split(self, values):
        wrt = {n: values[n] for n in (*self.case.wrt, *self.case.frozen)}
        return wrt, {n: v for n, v in values.items() if n not in wrt}

    def objective(self, wrt, rest, **extra):
        """A scalar that weighs every output differently, and no masked row of an equivariant output."""
        out = self.call({**wrt, **rest}, **extra)
        leaves = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        keep = next((v for n, v in rest.items() if self.case.args[n].role == "where"), None)
        total = 0.0
        for i, leaf in enumerate(leaves):
            weights = jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype) * 0.7 + i).reshape(leaf.shape)
            term = leaf * weights
            if keep is not None and self.case.symmetry == "equivariant":
                term = jnp.where(keep.reshape(keep.shape + (1,) * (leaf.ndim - keep.ndim)), term, jnp.zeros_like(term))
            total = total + jnp.sum(term)
        return total, out

    @functools.cached_property
    def single(self):
        return jax.jit(self.call)

    @functools.cached_property
    def batched(self):
        if not (self.case.wrt or self.case.frozen):
            return jax.jit(jax.vmap(lambda v: (self.call(v), {})))

        def run(values):
            wrt, rest = self.split(values)
            (_, out), grads = jax.value_and_grad(self.objective, has_aux=True)(wrt, rest)
            return out, grads

        return jax.jit(jax.vmap(run))

    @functools.cached_property
    def many(self):
        """Every float32 input of the suite in one call: values and gradients by the name of the input."""
        case, rows = self.case, {}
        base = inputs(case, 0)
        rows["base"], rows["other"] = base, inputs(case, 1)
        for i, values in enumerate(extremes(case)):
            rows[f"extreme {i}"] = values
        if case.rows:
            n = row_count(case)
            order = np.random.default_rng(3).permutation(n)
            rows["permuted"] = permute_rows(case, base, order)
            if any(a.role == "where" for a in case.args.values()):
                keep = np.arange(n) < max(1, n - 2)
                masked = with_where(case, base, keep)
                rows["masked"] = masked
                rows["masked nan"] = fill_rows(case, masked, ~keep, np.nan)
                rows["masked huge"] = fill_rows(case, masked, ~keep, 1e30)
        out, grads = jax.tree.map(np.asarray, self.batched(stack(list(rows.values()))))
        pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
        return {name: (pick(out, i), pick(grads, i)) for i, name in enumerate(rows)}


def close(a, b, *, tolerance=2e-4, message=""):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b), f"{message}: {len(a)} outputs against {len(b)}"
    for x, y in zip(a, b, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype.kind not in "fV" and y.dtype.kind not in "fV":
            np.testing.assert_array_equal(x, y, err_msg=message)
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        finite = np.abs(y[np.isfinite(y)])
        scale = max(1.0, finite.max()) if finite.size else 1.0
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale, err_msg=message)


def finite(tree, message):
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype.kind == "f":
            assert np.all(np.isfinite(leaf)), f"{message} is not finite: {leaf}"


def check_jit(runner: Runner):
    """Two traces give one program, jitted equals eager, other values do not retrace, and no tracer leaks."""
    a, b = inputs(runner.case, 0), inputs(runner.case, 1)
    first = runner.single.trace(a)
    second = jax.jit(lambda v: runner.call(v)).trace(a)  # a new function, as JAX answers an old one from its cache
    with jax.checking_leaks():  # prints shared parts in another way, so that its program cannot be compared
        jax.eval_shape(lambda v: runner.call(v), a)
    programs = [re.sub("0x[0-9a-f]+", "", str(traced.jaxpr)) for traced in (first, second)]  # addresses of callbacks
    assert programs[0] == programs[1], "a second trace gives another program"
    compiled = runner.single(a)
    before = runner.traces
    runner.single(b)
    assert runner.traces == before, "the second call with other values traced again"
    if runner.case.eager:
        with counted() as count:
            eager = runner.call(a)
        runner.eager += count[0]
        close(compiled, eager, message="jit against eager")
    close(compiled, runner.single(a), tolerance=0, message="two equal calls")


def check_vmap(runner: Runner):
    """Vmap equals a Python loop."""
    for name, seed in (("base", 0), ("other", 1)):
        close(runner.many[name][0], runner.single(inputs(runner.case, seed)), message="vmap against loop")


def check_extremes(runner: Runner):
    """Equal, huge, zero, identical, certain, single and absent inputs give finite values and gradients."""
    for name, (out, grads) in runner.many.items():
        if name.startswith("extreme") or name in ("base", "other"):
            finite(out, f"the value of {name}")
            finite(grads, f"the gradient of {name}")


def check_frozen(runner: Runner):
    """Arguments behind a stop-gradient have exactly zero gradient, the others a gradient that is not."""
    _, grads = runner.many["base"]
    for name in runner.case.frozen:
        assert not np.any(grads[name]), f"gradient reaches {name}, which is frozen"
    for name in runner.case.wrt:
        assert np.any(grads[name]), f"no gradient reaches {name}"


def check_masked(runner: Runner):
    """Nothing under the mask, NaN included, changes a value or has a gradient."""
    case = runner.case
    if "masked" not in runner.many:
        return
    out, grads = runner.many["masked"]
    n = row_count(case)
    kept = np.arange(n) < max(1, n - 2)
    real = (lambda tree: jax.tree.map(lambda x: x[kept], tree)) if case.symmetry == "equivariant" else lambda tree: tree
    for name in ("masked nan", "masked huge"):
        close(real(runner.many[name][0]), real(out), tolerance=1e-6, message=name)
    for name in ("masked", "masked nan", "masked huge"):
        finite(real(runner.many[name][0]), name)
        for arg, gradient in runner.many[name][1].items():
            finite(gradient, f"gradient of {arg} with {name}")
            if arg in case.rows:
                under = np.moveaxis(gradient, case.rows[arg], 0)[~kept]
                assert not np.any(under), f"gradient of {arg} under the mask is not exactly zero ({name})"
    close(runner.many["masked nan"][1], grads, tolerance=1e-6, message="gradients with NaN under the mask")


def check_padding(runner: Runner):
    """Masked rows give what the function gives without these rows."""
    case = runner.case
    if "masked" not in runner.many:
        return
    n = row_count(case)
    kept = np.arange(n) < max(1, n - 2)
    short = {
        name: np.compress(kept, v, axis=case.rows[name]) if name in case.rows else v
        for name, v in inputs(case, 0).items()
    }
    out = runner.many["masked"][0]
    if case.symmetry == "equivariant":
        out = jax.tree.map(lambda x: x[kept], out)
    close(out, jax.jit(runner.call)(short), message="padded against short")


def check_permutation(runner: Runner):
    """A permutation of the rows changes nothing, or permutes the rows of the result."""
    case = runner.case
    if case.symmetry is None or not case.rows:
        return
    order = np.random.default_rng(3).permutation(row_count(case))
    out, grads = runner.many["base"]
    moved, moved_grads = runner.many["permuted"]
    if case.symmetry == "equivariant":
        close(moved, jax.tree.map(lambda x: x[order], out), message="permuted rows")
        return
    close(moved, out, message="permuted rows")
    for name, gradient in grads.items():
        expected = np.take(gradient, order, axis=case.rows[name]) if name in case.rows else gradient
        close(moved_grads[name], expected, message=f"gradient of {name} for permuted rows")


def check_gradient(runner: Runner):
    """In float64 the gradient equals central differences in random directions, or the case's own oracle."""
    case = runner.case
    if not case.wrt:
        if any(a.role in FLOATING for a in case.args.values()):
            assert case.reason, "floating inputs and an empty wrt need a reason"
        return
    with jax.enable_x64(True):
        values = inputs(case, 0, np.float64)
        wrt, rest = runner.split(values)
        moving = {n: wrt[n] for n in case.wrt}
        fixed = {n: wrt[n] for n in case.frozen}
        rng = np.random.default_rng(5)
        step = 1e-6
        directions = [{n: rng.normal(size=v.shape) for n, v in moving.items()} for _ in range(3)]
        points = [moving]
        for d in directions:
            points += [{n: v + s * step * d[n] for n, v in moving.items()} for s in (1, -1)]

        def run(point):
            (value, out), grads = jax.value_and_grad(lambda p: runner.objective({**p, **fixed}, rest), has_aux=True)(
                point
            )
            return value, grads, out

        values, grads, out = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(stack(points)))
        for leaf in jax.tree.leaves(out):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert leaf.dtype == jnp.float64, f"float64 in, {leaf.dtype} out"
        grads = jax.tree.map(lambda g: g[0], grads)
    if case.grad_oracle is not None:
        close(grads, case.grad_oracle(**inputs(case, 0, np.float64)), tolerance=1e-5, message="gradient against oracle")
        return
    for i, d in enumerate(directions):
        numeric = float(values[1 + 2 * i] - values[2 + 2 * i]) / (2 * step)
        exact = sum(float(np.sum(grads[n] * d[n])) for n in case.wrt)
        scale = max(1e-3, sum(float(np.abs(grads[n] * d[n]).sum()) for n in case.wrt))
        assert abs(numeric - exact) <= 1e-4 * scale, f"derivative {exact} against differences {numeric}"


def check_dtype(runner: Runner):
    """float32 and bfloat16 come out as they went in, weak scalars promote nothing, sums are kept in float32."""
    case = runner.case
    floats = [n for n, a in case.args.items() if a.role in FLOATING]
    if not floats:
        return
    full = inputs(case, 0)
    half = {n: v.astype(jnp.bfloat16) if n in floats else v for n, v in full.items()}
    in_half = jax.jit(runner.call).trace(half)
    for leaf in jax.tree.leaves(in_half.out_info):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            scalar_loss = leaf.ndim == 0 and leaf.dtype == jnp.float32
            assert leaf.dtype == jnp.bfloat16 or scalar_loss, f"bfloat16 in, {leaf.dtype} out"
    for leaf in jax.tree.leaves(runner.single.trace(full).out_info):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32, f"float32 in, {leaf.dtype} out"
            assert not leaf.weak_type, "the result is weakly typed"
    rounded = {n: np.asarray(v, np.float32) if n in floats else v for n, v in half.items()}
    got, expected = in_half.lower().compile()(half), runner.single(rounded)
    close(got, expected, tolerance=case.bfloat16_tolerance, message="bfloat16 against float32 of the same numbers")


def check_key(runner: Runner):
    """A key is used once, decides the result, and the same key gives the same result."""
    keys = [n for n, a in runner.case.args.items() if a.role == "key"]
    if not keys:
        return
    with jax.debug_key_reuse(True):
        jax.jit(lambda v: runner.call(v)).trace(inputs(runner.case, 0)).lower()
    a = inputs(runner.case, 0)
    first, second = runner.single(a), runner.single({**a, **{n: jax.random.key(99) for n in keys}})
    same = all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert not same, "the key changes nothing"


def check_shard_map(runner: Runner):
    """Works inside the default `shard_map`; with `axis_name`, rows spread over devices give the same numbers."""
    case = runner.case
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    if "axis_name" in inspect.signature(case.function).parameters and case.rows:
        return sharded_rows(runner, mesh)
    values = [inputs(case, seed) for seed in range(2)]
    stacked = stack([values[i % 2] for i in range(DEVICES)])

    def local(v):
        out = runner.call(jax.tree.map(lambda leaf: leaf[0], v))
        return jax.tree.map(lambda leaf: leaf[None], out)

    specs = jax.tree.map(lambda _: P("data"), stacked)
    out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P("data")))(stacked)
    out = jax.tree.map(np.asarray, out)
    for i, name in enumerate(("base", "other")):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], out), runner.many[name][0], message="inside shard_map")


def sharded_rows(runner: Runner, mesh):
    case = runner.case
    values = {
        n: np.concatenate([inputs(case, 10 + i)[n] for i in range(DEVICES)], axis=axis) for n, axis in case.rows.items()
    }
    values = {**{n: v for n, v in inputs(case, 10).items() if n not in case.rows}, **values}
    for name, arg in case.args.items():  # an uneven mask, so that a mean of local means would be wrong
        if arg.role == "where" and name in case.rows:
            values[name] = np.arange(values[name].size).reshape(values[name].shape) < values[name].size - 3
    wrt, rest = runner.split(values)
    spec = lambda n: P(*[None] * case.rows[n], "data") if n in case.rows else P()

    def objective(wrt, rest, axis_name):
        out = runner.call({**wrt, **rest}, axis_name=axis_name)
        leaves = jax.tree.leaves(out)
        return leaves[0] if len(leaves) == 1 and leaves[0].ndim == 0 else out

    def whole(wrt):
        out = objective(wrt, rest, None)
        return total(out), out

    def spread(wrt):
        specs = ({n: spec(n) for n in wrt}, {n: spec(n) for n in rest})
        out_specs = P("data") if case.symmetry == "equivariant" else P()
        mapped = jax.shard_map(
            lambda w, r: objective(w, r, "data"), mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=True
        )
        out = mapped(wrt, rest)
        return total(out), out

    def total(out):
        leaves = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(
            jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)) for leaf in leaves
        )

    def by_vmap(wrt):
        def local(w, r):
            return objective(w, r, "data")

        def blocks(tree):
            def block(n, v):
                if n not in case.rows:
                    return v
                axis = case.rows[n]
                shape = (*v.shape[:axis], DEVICES, v.shape[axis] // DEVICES, *v.shape[axis + 1 :])
                return jnp.moveaxis(jnp.reshape(v, shape), axis, 0)

            return {n: block(n, v) for n, v in tree.items()}

        axes = ({n: 0 if n in case.rows else None for n in wrt}, {n: 0 if n in case.rows else None for n in rest})
        out = jax.vmap(local, in_axes=axes, axis_name="data")(blocks(wrt), blocks(rest))
        if case.symmetry == "equivariant":
            out = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), out)
        else:
            out = jax.tree.map(lambda x: jnp.mean(x, axis=0), out)
        return total(out), out

    graded = [jax.value_and_grad(form, has_aux=True) for form in (whole, by_vmap)]
    expected, mapped = jax.jit(lambda w: tuple(form(w) for form in graded))(wrt)
    close(mapped, expected, message="rows over vmap(axis_name)")
    close(jax.jit(jax.value_and_grad(spread, has_aux=True))(wrt), expected, message="rows over shard_map")


def check_explicit(runner: Runner):
    """Arrays on a mesh with Explicit axes work with `axis_name=None`."""
    case = runner.case
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    values = inputs(case, 0)
    with jax.set_mesh(mesh):
        placed = {}
        for name, v in values.items():
            axis = case.rows.get(name)
            even = axis is not None and case.args[name].shape[axis] % 2 == 0
            spec = P(*[None] * axis, "data") if even else P()
            placed[name] = jax.device_put(v, NamedSharding(mesh, spec))
        out = jax.tree.map(np.asarray, jax.jit(runner.call)(placed))
    close(out, runner.many["base"][0], message="on an Explicit mesh")


CHECKS = {name[6:]: f for name, f in list(globals().items()) if name.startswith("check_")}
HELPER_CHECKS = ("jit", "extremes", "dtype")


@contextlib.contextmanager
def counted():
    """Counts the programs that XLA is asked for, compiled or from the cache."""
    count = [0]
    live = [True]

    def listen(event, duration, **_):
        if live[0] and event == "/jax/core/compile/backend_compile_duration":
            count[0] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        live[0] = False


def run_case(case: Case) -> None:
    """Runs every invariant of one case; raises AssertionError with the invariant's name."""
    unknown = set(case.skip) - set(CHECKS)
    if unknown:
        raise ValueError(f"{case.label}: unknown invariants {sorted(unknown)} in skip")
    if not all(case.skip.values()):
        raise ValueError(f"{case.label}: every skip needs a reason")
    if case.host:
        return run_host_case(case)
    runner = Runner(case)
    with counted() as count:
        for name, check in CHECKS.items():
            if name in case.skip or (case.helper and name not in HELPER_CHECKS):
                continue
            try:
                check(runner)
            except AssertionError as error:
                raise AssertionError(f"{case.label}: {name}: {error}") from error
    made = count[0] - runner.eager
    if made > MAX_EXECUTABLES:
        raise AssertionError(f"{case.label}: {made} executables, {MAX_EXECUTABLES} are allowed")


def run_host_case(case: Case) -> None:
    """Runs what host work has to keep: it repeats itself and leaves its inputs alone."""
    values, untouched = inputs(case, 0), inputs(case, 0)
    results = [jax.tree.map(np.asarray, case.function(**values, **case.static)) for _ in range(2)]
    close(*results, tolerance=0, message=f"{case.label}: two equal calls")
    for name, value in values.items():
        if case.args[name].role != "key":
            np.testing.assert_array_equal(value, untouched[name], err_msg=f"{case.label} changes its input {name}")


REGISTERED: list[Case] = []


def conformance_tests(cases: list[Case]):
    """Turns cases into one parametrised pytest function; the first full case also runs eagerly."""
    first = next((case for case in cases if not (case.helper or case.host)), None)
    cases = [dataclasses.replace(case, eager=True) if case is first else case for case in cases]
    REGISTERED.extend(cases)

    @pytest.mark.parametrize("case", cases, ids=[case.label for case in cases])
    def test_conformance(case, record_property):
        for name, reason in case.skip.items():
            record_property("skipped_invariant", f"{case.label}: {name}: {reason}")
        run_case(case)

    return test_conformance
