"""Runs a paper's claim, judges it by the rule that its row stated beforehand, and records what came out.

A claim is `claim(*, seeds, smoke=False) -> Outcome`. Its row of `papers.toml` states under `[paper.claim]` the `kind`
(`better`, `not_worse`, `within`, `ordered`, `all_true`), the `evidence` (`paper`, `scaled`, `proxy`, `mechanics`), the
`metric`, and what the kind needs: `margin` and `saving`, `low` and `high`, or `order`.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import catalog

MIN_SEEDS = 5
NAMES = {
    "paper": ("reproduced", "inconclusive", "not reproduced"),
    "scaled": ("reproduced", "inconclusive", "not reproduced"),
    "proxy": ("effect seen", "inconclusive", "effect not seen"),
    "mechanics": ("checked", "inconclusive", "failed"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a claim measured.

    Attributes:
        arms: the primary metric of each arm, one value a seed, higher is better; the method comes first.
        facts: what must hold, for `all_true`.
        floor: plain supervised training of the same budget, one value a seed; a baseline whose mean lies below it
            invalidates the claim.
        learnt: whether each arm learnt at all.
        saving: what `not_worse` buys, as a fraction.
        secondary: everything else; it changes no verdict.
        data: what it was measured on.
    """

    arms: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    floor: Sequence[float] | None = None
    learnt: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    saving: float | None = None
    secondary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A verdict with the effect, its 95% interval and the reason."""

    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    reason: str


def t_quantile(degrees: int) -> float:
    """Returns the 97.5% quantile of Student's t, by bisection of its distribution function.

    Example:
        >>> round(t_quantile(4), 3)
        2.776
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1")
    nodes, weights = np.polynomial.legendre.leggauss(200)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def above_zero(t: float) -> float:
        x = (nodes + 1) * t / 2
        return float(np.sum(weights * constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2)) * t / 2)

    low, high = 0.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if above_zero(middle) < 0.475 else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of the values and the ends of its 95% interval."""
    x = np.asarray(values, np.float64)
    half = t_quantile(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def judge(spec: Mapping[str, Any], outcome: Outcome) -> Judgement:
    """Judges an outcome by the rule of its row.

    Args:
        spec: the row's `[paper.claim]`.
        outcome: what was measured.

    Returns:
        A `Judgement`; `invalid` if the measurement itself cannot carry a verdict.

    Raises:
        ValueError: the row states an unknown kind or evidence.
    """
    kind, evidence = spec["kind"], spec["evidence"]
    if evidence not in NAMES:
        raise ValueError(f"evidence={evidence!r} must be one of {', '.join(NAMES)}")
    yes, open_, no = NAMES[evidence]

    def invalid(reason: str) -> Judgement:
        return Judgement("invalid", None, None, None, reason)

    if not all(outcome.learnt.values()):
        return invalid(f"did not learn: {', '.join(n for n, ok in outcome.learnt.items() if not ok)}")
    if kind == "all_true":
        wrong = [name for name, holds in outcome.facts.items() if not holds]
        if not outcome.facts:
            return invalid("no facts were checked")
        return Judgement(no if wrong else yes, None, None, None, f"false: {', '.join(wrong)}" if wrong else "all hold")
    arms = {name: np.asarray(values, np.float64) for name, values in outcome.arms.items()}
    lengths = {len(v) for v in arms.values()}
    if not arms or len(lengths) != 1 or min(lengths) < MIN_SEEDS:
        return invalid(f"needs the same {MIN_SEEDS} or more seeds in every arm, got {sorted(lengths)}")
    floor = None if outcome.floor is None else np.asarray(outcome.floor, np.float64)
    if not all(np.all(np.isfinite(v)) for v in (*arms.values(), *(() if floor is None else (floor,)))):
        return invalid("values are not finite")
    names = list(arms)
    baseline = spec.get("baseline", names[1] if len(names) > 1 else None)

    def decide(effect: tuple[float, float, float], border: float, reason: str) -> Judgement:
        verdict = yes if effect[1] > border else no if effect[2] < border else open_
        return Judgement(verdict, *effect, reason)

    if kind == "within":
        mean, low, high = interval(arms[names[0]])
        inside, outside = spec["low"] <= low and high <= spec["high"], high < spec["low"] or low > spec["high"]
        return Judgement(
            yes if inside else no if outside else open_, mean, low, high, f"{spec['low']} to {spec['high']}"
        )
    if kind == "ordered":
        order = list(spec["order"])
        if len(order) < 3 or not set(order) <= set(arms):
            return invalid(f"an order of at least 3 arms is needed, got {order} of {names}")
        steps = [interval(arms[a] - arms[b]) for a, b in itertools.pairwise(order)]
        worst = min(steps, key=lambda s: s[1])
        verdict = no if any(s[2] < 0 for s in steps) else yes if all(s[1] > 0 for s in steps) else open_
        return Judgement(verdict, *worst, " > ".join(order))
    if baseline not in arms or baseline == names[0]:
        return invalid(f"the baseline {baseline!r} is not among the arms {names}")
    if floor is not None and arms[baseline].mean() < floor.mean():
        return invalid(f"{baseline} lies below plain supervised training of the same budget")
    effect = interval(arms[names[0]] - arms[baseline])
    if kind == "better":
        return decide(effect, 0.0, f"{names[0]} against {baseline}")
    if kind == "not_worse":
        judged = decide(effect, -spec["margin"], f"{names[0]} within {spec['margin']} of {baseline}")
        if judged.verdict == yes and (outcome.saving is None or outcome.saving < spec["saving"]):
            return dataclasses.replace(
                judged, verdict=no, reason=f"saves {outcome.saving}, {spec['saving']} was claimed"
            )
        return judged
    raise ValueError(f"kind={kind!r} must be better, not_worse, within, ordered or all_true")


def load_claim(paper: catalog.Paper):
    """Returns the paper's `claim` function.

    Raises:
        LookupError: the paper has no claim, or its row does not state one.
    """
    name = f"jaxlab.claims.{paper.family}.{paper.key}"
    if paper.claim is None:
        raise LookupError(f"{paper.key} has no claim yet: its row states none")
    try:
        return importlib.import_module(name).claim
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise LookupError(f"{paper.key} has no claim yet: there is no {name.replace('.', '/')}.py") from error
        raise


def run(paper: catalog.Paper, *, smoke: bool = False, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Runs one claim and returns its record.

    Args:
        paper: whose claim.
        smoke: the form of a few seconds; its verdict is `smoke`.
        seeds: default `0 .. n - 1` with the row's `seeds` (5).

    Raises:
        LookupError: there is no claim.
        ValueError: a smoke run did not learn or is not finite.
    """
    claim = load_claim(paper)
    spec = dict(paper.claim or {})
    seeds = list(range(2 if smoke else spec.get("seeds", MIN_SEEDS))) if seeds is None else list(seeds)
    began = time.monotonic()
    outcome = claim(seeds=seeds, smoke=smoke)
    seconds = time.monotonic() - began
    if smoke:
        values = [x for arm in outcome.arms.values() for x in arm]
        if not np.all(np.isfinite(values)) or not all(outcome.learnt.values()):
            raise ValueError(f"the smoke run of {paper.key} is not finite or did not learn: {dict(outcome.learnt)}")
        judged = Judgement("smoke", None, None, None, "a smoke run gives no verdict")
    else:
        judged = judge(spec, outcome)
    return {
        "key": paper.key,
        "family": paper.family,
        **{name: spec.get(name) for name in ("kind", "evidence", "metric")},
        "verdict": judged.verdict,
        "effect": judged.effect,
        "interval": [judged.low, judged.high],
        "reason": judged.reason,
        "arms": {name: [float(v) for v in values] for name, values in outcome.arms.items()},
        "facts": {name: bool(v) for name, v in outcome.facts.items()},
        "floor": None if outcome.floor is None else [float(v) for v in outcome.floor],
        "saving": outcome.saving,
        "learnt": {name: bool(v) for name, v in outcome.learnt.items()},
        "secondary": _plain(outcome.secondary),
        "data": outcome.data,
        "seeds": seeds,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {name: version(name) for name in ("jaxlab", "jax", "jaxlib", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "spec": spec,
        "hash": catalog.claim_hash(paper),
        "source_hash": catalog.source_hash(paper),
    }


def record(paper: catalog.Paper, result: Mapping[str, Any], *, directory: Path | None = None) -> Path:
    """Writes a record beside its claim; the record that was there goes onto `history`, so that repeated tries show."""
    directory = Path(__file__).parent / paper.family if directory is None else directory
    path = directory / f"{paper.key}.json"
    history: list[Any] = []
    if path.exists():
        old = json.loads(path.read_text())
        kept = ("date", "hash", "verdict", "effect", "interval", "seconds", "arms", "seeds")
        history = [*old.pop("history", []), {name: old.get(name) for name in kept}]
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({**result, "history": history}, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def load_record(paper: catalog.Paper) -> dict[str, Any]:
    """Returns the recorded result of a claim.

    Raises:
        LookupError: none is recorded.
    """
    path = Path(__file__).parent / paper.family / f"{paper.key}.json"
    if not path.exists():
        raise LookupError(f"no claim of {paper.key} is recorded: jaxlab claim {paper.key} --record")
    return json.loads(path.read_text())


def command(args) -> int:
    """Carries out `jaxlab claim`: progress on stderr, results on stdout; 1 if a claim raised or is invalid."""
    if args.keys:
        chosen = [catalog.find(key) for key in args.keys]
    else:
        rows = catalog.json_rows(family=args.family)
        everyone = {paper.id: paper for paper in catalog.papers()}
        chosen = [everyone[row["id"]] for row in rows if everyone[row["id"]].claim is not None]
        if args.stale:
            chosen = [p for p in chosen if (catalog.claim_of(p) or {"stale": True})["stale"]]
        if args.family is None and not args.stale:
            raise LookupError("which claims? Give keys, --family or --stale")
    results, failed = [], False
    for paper in _with_progress(chosen):
        try:
            result = run(paper, smoke=args.smoke)
        except LookupError:
            raise
        except Exception as error:  # the others still run; the exit code says that one failed
            if getattr(args, "traceback", False):
                raise
            print(f"jaxlab: {paper.key}: {error}", file=sys.stderr)
            failed = True
            continue
        failed |= result["verdict"] == "invalid"
        if args.record and not args.smoke:
            record(paper, result)
        results.append(result)
    if args.json:
        print(json.dumps(results))
    else:
        for r in results:
            effect = (
                ""
                if r["effect"] is None
                else f"  effect {r['effect']:+.4f} [{r['interval'][0]:+.4f}, {r['interval'][1]:+.4f}]"
            )
            print(f"{r['key']}: {r['verdict']} ({r['evidence']}){effect}  {r['reason']}  {r['seconds']} s")
    return int(failed)


def _with_progress(chosen: Sequence[catalog.Paper]) -> Iterator[catalog.Paper]:
    """Yields the papers, with a bar on a terminal and a line for each elsewhere."""
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        bar = tqdm(chosen, unit="claim", file=sys.stderr, leave=False)
        for paper in bar:
            bar.set_description(paper.key)
            yield paper
        return
    for i, paper in enumerate(chosen):
        print(f"[{i + 1}/{len(chosen)}] {paper.key}", file=sys.stderr, flush=True)
        yield paper


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, (str, bool)) or value is None:
        return value
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()
