"""What training costs each bag classifier as its bags grow: one list of instances against bags padded to the longest.

Four bags that hold 55, 25, 15 and 5 in a hundred of the instances, 512 features each: value and gradient of the
cross-entropy with respect to the parameters. Time is measured until it would be too long; temporary bytes are what the
compiler states, so that they are there for every size. The exponent says how a figure grows with the instances from one
size to the next: 1 is linear.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import mil
from jaxlab.bench import runner
from jaxlab.types import Layer

SHARES = (0.55, 0.25, 0.15, 0.05)
SIZES = (1_000, 10_000, 100_000)
WIDTH, SECONDS = 512, 20.0


def re_embedded(model: Layer) -> Layer:
    """Returns a bag model with R2T before it."""
    block = mil.r2t()

    def init(key, size):
        keys = jax.random.split(key)
        return {"block": block.init(keys[0], size), "model": model.init(keys[1], size)}

    def apply(params, x, *, where=None, segment_ids=None, num_segments=None, max_length=None):
        layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
        h = block.apply(params["block"], x, **layout, max_length=max_length)
        return model.apply(params["model"], h, **layout)

    return Layer(init, apply)


MODELS: dict[str, Layer] = {
    "mean_mil": mil.mean_mil(2),
    "max_mil": mil.max_mil(2),
    "mi_net": mil.mi_net(2),
    "mi_net_multi": mil.mi_net_multi(2),
    "deepsets": mil.deepsets(2),
    "abmil": mil.abmil(2),
    "gated abmil": mil.abmil(2, gated=True),
    "dsmil": mil.dsmil(2),
    "hopfield_mil": mil.hopfield_mil(2),
    "mamba_mil": mil.mamba_mil(2),
    "r2t, abmil": re_embedded(mil.abmil(2)),
    "transmil": mil.transmil(2),
    "gnn_mil": mil.gnn_mil(2),
}


def rows(
    names: Sequence[str], *, sizes: Sequence[int] = SIZES, width: int = WIDTH, rounds: int = 3, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Returns a row for each model and size.

    Args:
        names: of `MODELS`.
        sizes: instances, ascending.
        width: features.
        rounds: timed runs of each layout, in turn.
        seconds: a size at which a run would be longer than this is not timed.
    """
    made = []
    for name in names:
        allowed = {"list": True, "padded": True}
        before: dict[str, Any] = {}
        for size in sizes:
            print(f"{name}, {size} instances", file=sys.stderr, flush=True)
            row = _row(name, size, width, rounds, allowed)
            for key in ("ms", "peer_ms", "temp_bytes", "peer_temp_bytes"):
                row[f"{key}_exponent"] = _exponent(before.get("instances"), before.get(key), size, row[key])
            before = {"instances": size, **row}
            for layout, key in (("list", "ms"), ("padded", "peer_ms")):
                # The next size is ten times as large, and time may grow with its square.
                allowed[layout] = row[key] is not None and row[key] * 100 < 1e3 * seconds * 10
            made.append(row)
    return made


def render(made: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as lines for a terminal."""
    number = lambda value, text: "-" if value is None else format(value, text)
    names = ("ms", "padded", "MiB", "padded")
    head = " ".join(name.rjust(9) for name in names)
    lines = [f"{'model':14s} instances {head}  ms ~n^  bytes ~n^"]
    for row in made:
        cells = [number(row[key], "9.1f").rjust(9) for key in ("ms", "peer_ms")]
        cells += [f"{row[key] / 2**20:9.1f}" for key in ("temp_bytes", "peer_temp_bytes")]
        cells += [number(row[f"{key}_exponent"], "7.2f").rjust(7) for key in ("ms", "temp_bytes")]
        lines.append(f"{row['params']['model']:14s} {row['params']['instances']:9d} {' '.join(cells)}")
    return "\n".join(lines)


def command(args) -> int:
    """Carries out `jaxlab bench mil`."""
    if args.rounds < 1:
        raise LookupError(f"--rounds must be at least 1, got {args.rounds}")
    options = {"sizes": (100, 200), "width": 16} if args.quick else {}
    rounds = min(args.rounds, 3)
    made = rows(list(MODELS), rounds=rounds, **options)
    if args.record:
        entry = {**runner.surroundings(rounds), "rows": made}
        runner.record(
            "mil", entry, directory=runner.RESULTS / "families"
        )  # apart from the kernels, whose rows are whole
    print(json.dumps(made) if args.json else render(made))
    return 0


def _row(name: str, size: int, width: int, rounds: int, timed: Mapping[str, bool]) -> dict[str, Any]:
    counts = [max(1, int(share * size)) for share in SHARES]
    counts[0] += size - sum(counts)
    arguments = _arguments(counts, width)
    programs = {
        layout: (jax.jit(function).lower(*args).compile(), args)
        for layout, (function, args) in _programs(MODELS[name], counts, width, arguments).items()
    }
    ms: dict[str, list[float]] = {layout: [] for layout in programs if timed[layout]}
    for i in range(rounds + 1):
        for layout, values in ms.items():
            program, args = programs[layout]
            began = time.perf_counter()
            jax.block_until_ready(program(*args))
            if i:  # the first round warms caches
                values.append(1e3 * (time.perf_counter() - began))
    medians = {layout: round(float(np.median(ms[layout])), 3) if layout in ms else None for layout in programs}
    both = all(value is not None for value in medians.values())
    quartiles = [round(float(v), 3) for v in np.percentile(ms["list"], (25, 75))] if "list" in ms else None
    return {
        "case": "mil",
        "params": {"model": name, "instances": size, "bags": len(counts), "D": width, "pass": "fwd_bwd"},
        "ms": medians["list"],
        "quartiles": quartiles,
        "peer": "padded to the longest bag",
        "peer_ms": medians["padded"],
        "ratio": round(medians["list"] / medians["padded"], 3) if both else None,  # pyright: ignore
        "ceiling_ms": None,
        "ceiling_fraction": None,
        "work_ratio": round(len(counts) * max(counts) / size, 3),
        "temp_bytes": runner._temp_bytes(programs["list"][0]),
        "peer_temp_bytes": runner._temp_bytes(programs["padded"][0]),
        "torch_loop_ms": _torch_loop_ms(name, arguments["list"], counts, rounds),
    }


def _arguments(counts: Sequence[int], width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    listed = rng.standard_normal((sum(counts), width), np.float32)
    padded = np.zeros((len(counts), max(counts), width), np.float32)
    for bag, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        padded[bag, :count] = listed[end - count : end]
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return {
        "list": listed,
        "padded": padded,
        "ids": ids,
        "where": np.arange(max(counts))[None] < np.array(counts)[:, None],
    }


def _programs(model: Layer, counts: Sequence[int], width: int, arguments) -> dict[str, tuple[Callable, tuple]]:
    """Returns by layout value and gradient of the bags' cross-entropy, and its arguments."""
    params = jax.jit(lambda key: model.init(key, width))(jax.random.key(0))
    labels = jnp.arange(len(counts)) % 2
    more = {"max_length": max(counts)} if "block" in params and "model" in params else {}

    def loss(params, x, **layout):
        z = model.apply(params, x, **layout)["logits"]
        z = jnp.concatenate([jnp.zeros_like(z), z], axis=1) if z.shape[1] == 1 else z
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, labels))

    form = jax.value_and_grad(loss)
    listed = lambda params, x, ids: form(params, x, segment_ids=ids, num_segments=len(counts), **more)
    padded = lambda params, x, where: form(params, x, where=where)
    put = {name: jnp.asarray(value) for name, value in arguments.items()}
    return {
        "list": (listed, (params, put["list"], put["ids"])),
        "padded": (padded, (params, put["padded"], put["where"])),
    }


def _exponent(size: int | None, value: float | None, next_size: int, next_value: float | None) -> float | None:
    if not size or not value or not next_value:
        return None
    return round(math.log(next_value / value) / math.log(next_size / size), 3)


def _torch_loop_ms(name: str, x: np.ndarray, counts: Sequence[int], rounds: int) -> float | None:
    """Returns the same of a PyTorch loop over the bags, for attention pooling alone; None without PyTorch."""
    if name != "abmil" or importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    hidden, score, head = (
        torch.nn.Linear(x.shape[1], 128, False),
        torch.nn.Linear(128, 1, False),
        torch.nn.Linear(x.shape[1], 2),
    )
    bags = torch.split(torch.from_numpy(x), list(counts))
    labels = torch.arange(len(counts)) % 2
    taken = []
    for i in range(rounds + 1):
        began = time.perf_counter()
        pooled = [torch.softmax(score(torch.tanh(hidden(bag))), dim=0).T @ bag for bag in bags]
        torch.nn.functional.cross_entropy(head(torch.cat(pooled)), labels).backward()
        if i:
            taken.append(1e3 * (time.perf_counter() - began))
    return round(float(np.median(taken)), 3)
