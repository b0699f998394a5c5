"""Times several programs in turn, and says how they compare.

Competitors run interleaved, round after round, in one process: what disturbs the machine disturbs all of them. A figure
is the median over rounds; ratios are medians of the rounds' own ratios. The ceiling is the same useful arithmetic as
one dense product, the naive form what anyone would write first.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Contest:
    """One thing to measure.

    Attributes:
        case: what is measured.
        params: sizes, dtype and pass ("fwd" or "fwd_bwd").
        ours: the function under test.
        args: its arguments, and those of the peer.
        peer: name and function of what it is compared with; None where there is nothing to compare with here.
        ceiling: function and arguments of the same useful arithmetic at its fastest; None without one.
        work_ratio: executed over useful rows or tiles, counted exactly; None where nothing is wasted by design.
        foreign: whether the peer is a callable without arguments that does the same work as it stands.
        part: function and arguments of what a foreign peer compiles and calls in a loop; what it costs to compile is
            compared too.
    """

    case: str
    params: Mapping[str, Any]
    ours: Callable[..., Any]
    args: Sequence[Any]
    peer: tuple[str, Callable[..., Any]] | None
    ceiling: tuple[Callable[..., Any], Sequence[Any]] | None = None
    work_ratio: float | None = None
    foreign: bool = False
    part: tuple[Callable[..., Any], Sequence[Any]] | None = None


def run(contest: Contest, *, rounds: int = 9) -> dict[str, Any]:
    """Returns the row of one contest: milliseconds, ratios and the temporary bytes that the compiler states."""
    jobs = {"ours": (contest.ours, contest.args)}
    if contest.peer is not None and not contest.foreign:
        jobs["peer"] = (contest.peer[1], contest.args)
    if contest.ceiling is not None:
        jobs["ceiling"] = contest.ceiling
    compiled, seconds = {}, {}
    for name, (function, args) in {**jobs, **({"part": contest.part} if contest.part else {})}.items():
        compiled[name], seconds[name] = _timed_compile(function, args)
    part, extra = compiled.pop("part", None), {}
    if part is not None:
        extra = {"compile_s": round(seconds["ours"], 2), "compile_ratio": round(seconds["ours"] / seconds["part"], 2)}
    calls = {name: functools.partial(program, *jobs[name][1]) for name, program in compiled.items()}
    if contest.peer is not None and contest.foreign:
        calls["peer"] = contest.peer[1]
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if i:  # the first round warms caches
                ms[name].append(1e3 * (time.perf_counter() - began))
    each = {name: np.asarray(values) for name, values in ms.items()}
    low, high = np.percentile(each["ours"], (25, 75))

    def median(values) -> float | None:
        return None if values is None else round(float(np.median(values)), 3)

    peer, ceiling = each.get("peer"), each.get("ceiling")
    return {
        "case": contest.case,
        "params": dict(contest.params),
        "ms": median(each["ours"]),
        "quartiles": [round(float(low), 3), round(float(high), 3)],
        "peer": None if contest.peer is None else contest.peer[0],
        "peer_ms": median(peer),
        "ratio": median(None if peer is None else each["ours"] / peer),
        "ceiling_ms": median(ceiling),
        "ceiling_fraction": median(None if ceiling is None else ceiling / each["ours"]),
        "work_ratio": contest.work_ratio,
        "temp_bytes": _temp_bytes(compiled["ours"]),
        "peer_temp_bytes": None if (other := compiled.get("peer", part)) is None else _temp_bytes(other),
        **extra,
    }


def _timed_compile(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, float]:
    """Returns the compiled function and the seconds from its trace to its program."""
    began = time.perf_counter()
    program = jax.jit(lambda *args: function(*args)).lower(*args).compile()
    return program, time.perf_counter() - began


def _temp_bytes(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def matmul_gflops(size: int = 1024, rounds: int = 5) -> float:
    """Returns the rate of one float32 matrix product, so that runs on two machines can be put side by side."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    best = np.inf
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - began)
    return round(2 * size**3 / best / 1e9, 1)


def surroundings(rounds: int) -> dict[str, Any]:
    """Returns machine, versions, load and commit: what the figures hold for."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jaxlab", "jax", "jaxlib", "numpy")},
        "commit": head.stdout.strip() or None,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
        "matmul_gflops": matmul_gflops(),
    }


def record(name: str, entry: Mapping[str, Any], *, directory: Path = RESULTS) -> Path:
    """Appends a run to `results/<name>.json`."""
    path = directory / f"{name}.json"
    directory.mkdir(exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps([*runs, dict(entry)], indent=1) + "\n")
    os.replace(temporary, path)
    return path


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as lines for a terminal."""
    lines = []
    for row in rows:
        params = " ".join(f"{name}={value}" for name, value in row["params"].items())
        parts = [f"{row['ms']:.2f} ms"]
        if row["ratio"] is not None:
            parts.append(f"{row['ratio']:.2f} of {row['peer']} ({row['peer_ms']:.2f} ms)")
        if row["ceiling_fraction"] is not None:
            parts.append(f"{row['ceiling_fraction']:.2f} of the ceiling's rate")
        if row["work_ratio"] is not None:
            parts.append(f"{row['work_ratio']:.2f} rows for one needed")
        if "compile_ratio" in row:
            parts.append(f"compiled in {row['compile_ratio']:.2f} of one peer's time")
        against = row["peer_temp_bytes"]
        parts.append(
            f"{row['temp_bytes'] / 2**20:.1f} MiB" + ("" if against is None else f" against {against / 2**20:.1f}")
        )
        lines.append(f"{row['case']} {params}: {', '.join(parts)}")
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    if len(ratios) > 1:
        lines.append(f"geometric mean of {len(ratios)} ratios: {np.exp(np.mean(np.log(ratios))):.2f}")
    return "\n".join(lines)


def command(args, benches: Mapping[str, Callable[[bool], Iterable[Contest]]]) -> int:
    """Carries out `jaxlab bench`: progress on stderr, rows on stdout."""
    if args.name not in benches:
        import difflib

        close = difflib.get_close_matches(args.name, benches, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise LookupError(f"unknown benchmark {args.name!r}{hint}; there is {', '.join(benches)}")
    if args.rounds < 1:
        raise LookupError(f"--rounds must be at least 1, got {args.rounds}")
    rows = []
    for contest in benches[args.name](args.quick):
        print(f"{contest.case} {dict(contest.params)}", file=sys.stderr, flush=True)
        rows.append(run(contest, rounds=args.rounds))
    if args.record:
        record(args.name, {**surroundings(args.rounds), "rows": rows})
    print(json.dumps(rows) if args.json else render(rows))
    return 0
