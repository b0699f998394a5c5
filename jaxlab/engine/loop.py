"""The loop: train a recipe, stop and go on exactly, evaluate what came out."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab.engine import data as data_source
from jaxlab.engine.checkpoint import Checkpoints, params_sha256
from jaxlab.engine.errors import InputError
from jaxlab.engine.log import MetricsLog, Progress, plain, read_rows
from jaxlab.engine.mesh import batch_sharding, check_divides, make_mesh, state_shardings
from jaxlab.engine.plots import save_plots
from jaxlab.engine.recipes import Recipe, from_config
from jaxlab.types import Learner

EVAL_BATCH = 120


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        run_dir: directory of the run.
        step: steps taken.
        finished: False if it was interrupted.
        evaluation: what `evaluate_state` returned; empty if interrupted.
    """

    run_dir: Path
    step: int
    finished: bool
    evaluation: dict[str, Any]


def default_run_dir(recipe: Recipe) -> Path:
    """Returns `runs/<recipe>/<UTC time>-<seed>`."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path("runs") / recipe.name / f"{now}-{recipe.seed}"


def config_of(recipe: Recipe, dataset: data_source.Dataset) -> dict[str, Any]:
    """Returns what `config.json` holds: the recipe's fields, the data's fingerprint, the versions."""
    return {
        "recipe": recipe.name,
        "fields": dataclasses.asdict(recipe),
        "data": {"name": dataset.name, "source": dataset.source, "fingerprint": dataset.fingerprint},
        "versions": {name: version(name) for name in ("jaxlab", "jax", "jaxlib", "optax", "numpy")},
        "python": platform.python_version(),
    }


def read_config(run_dir: Path) -> dict[str, Any]:
    """Returns the configuration of a run.

    Raises:
        InputError: the directory holds no run, or its configuration cannot be read.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise InputError(f"{run_dir} is not the directory of a run: it has no config.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def train(recipe: Recipe, run_dir: Path, *, resume: bool = False, quiet: bool = False) -> Result:
    """Trains a recipe to its last step, or to the first interrupt, which saves.

    Args:
        recipe: what to train.
        run_dir: where everything goes.
        resume: go on from the newest checkpoint in `run_dir`.
        quiet: no progress on stderr.

    Raises:
        InputError: a field, the mesh, the data or the run directory does not fit.
    """
    recipe.validate()
    if run_dir.exists() and any(run_dir.iterdir()) and not resume:
        raise InputError(f"{run_dir} is not empty: go on with --resume {run_dir}, or name another --run-dir")
    mesh = make_mesh(recipe.mesh)
    for axis, name, value in recipe.divisions():
        check_divides(mesh, axis, name, value)
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    progress = Progress(recipe.steps, quiet=quiet)
    where = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"
    progress.say(f"{recipe.name}: {recipe.title}; {recipe.data}, {recipe.steps} steps on {where}, {recipe.expected}")

    dataset = data_source.load(recipe.data, data_dir=recipe.data_dir or None, fallback_dir=str(run_dir / "data"))
    size = len(dataset.train["y"])
    if recipe.batch > size:
        raise InputError(f"--batch {recipe.batch} is larger than the {size} training examples of {dataset.name}")
    config = config_of(recipe, dataset)
    if resume:
        saved = read_config(run_dir).get("data", {}).get("fingerprint")
        if saved != dataset.fingerprint:
            raise InputError(f"the data {recipe.data!r} changed since {run_dir} was started: it cannot go on exactly")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    learner = recipe.learner(dataset.num_classes, recipe.steps)
    root = jax.random.key(recipe.seed)
    example = data_source.batch_at(dataset.train, recipe.seed, 0, recipe.batch)
    checkpoints = Checkpoints(run_dir)
    began = time.monotonic()
    progress.say("compiling")
    init = jax.jit(lambda key: learner.init(key, example))
    shape = jax.eval_shape(init, root)
    start = 0
    if resume and checkpoints.latest() is not None:
        start, state = checkpoints.restore(shape)
    else:
        state = init(root)
        checkpoints.describe(state)
    if mesh is not None:
        state = jax.device_put(state, state_shardings(state, mesh))
    step_function = jax.jit(
        lambda state, batch, step: learner.update(state, batch, jax.random.fold_in(root, step + 1)), donate_argnums=0
    )
    log = MetricsLog(run_dir, resume_step=start if resume else None)
    progress.start = start

    stop: list[int] = []
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for s in handlers:
            signal.signal(s, lambda number, frame: stop.append(number))
    except ValueError:  # not the main thread: whoever called us handles signals
        handlers = {}
    step, compiled = start, False
    try:
        while step < recipe.steps and not stop:
            batch = data_source.batch_at(dataset.train, recipe.seed, step, recipe.batch)
            batch = jax.device_put(batch, None if mesh is None else batch_sharding(mesh))
            state, metrics = step_function(state, batch, np.int32(step))
            step += 1
            if not compiled:
                jax.block_until_ready(metrics)
                compiled = True
                progress.say(f"compiled in {time.monotonic() - began:.0f} s")
                progress.began = time.monotonic()
            if step % recipe.log_every == 0 or step == recipe.steps:
                row = plain(jax.device_get(metrics))
                log.write(step, row)
                progress.update(step, summary(row))
            if step % recipe.save_every == 0 and step < recipe.steps:
                checkpoints.save(step, state)
        checkpoints.save(step, state, wait=True)
        if step < recipe.steps:
            return Result(run_dir, step, False, {})
        evaluation = evaluate_state(learner, state, dataset)
        log.write(step, {name: v for name, v in evaluation.items() if name.startswith(("test_", "ensemble_"))})
    finally:
        log.close()
        checkpoints.close()
        progress.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    save_plots(run_dir, read_rows(run_dir / "metrics.jsonl"), evaluation)
    return Result(run_dir, step, True, evaluation)


def summary(row: dict[str, Any]) -> str:
    """Returns the loss and accuracy of a row in a few words."""
    parts = []
    for name in ("loss", "accuracy"):
        if name in row:
            parts.append(f"{name} " + " ".join(f"{v:.3f}" for v in np.atleast_1d(row[name])))
    return "  ".join(parts)


def evaluate_state(learner: Learner, state: Any, dataset: data_source.Dataset) -> dict[str, Any]:
    """Returns the figures of a state on the test set: accuracy of each peer and of the ensemble, confusion, load.

    The state is brought to one device first, so that the figures do not depend on the mesh it was trained on.
    """
    state = jax.device_put(jax.device_get(state), jax.devices()[0])
    predict = jax.jit(learner.predict)
    right, ensemble, total, counts = 0, 0, 0, 0
    confusion = np.zeros((dataset.num_classes, dataset.num_classes), int)
    for batch in data_source.eval_batches(dataset.test, min(EVAL_BATCH, len(dataset.test["y"]))):
        out = jax.device_get(predict(state, {"x": batch["x"]}))
        keep, labels = batch["where"], batch["y"]
        right = right + ((out["logits"].argmax(-1) == labels[None]) & keep[None]).sum(-1)
        guess = out["probs"].argmax(-1)
        ensemble += int(((guess == labels) & keep).sum())
        np.add.at(confusion, (labels[keep], guess[keep]), 1)
        total += int(keep.sum())
        counts = counts + out.get("expert_counts", 0)
    result = {
        "test_accuracy": (np.asarray(right) / total).tolist(),
        "ensemble_accuracy": ensemble / total,
        "confusion": confusion.tolist(),
    }
    if np.ndim(counts):
        result["expert_counts"] = np.asarray(counts).tolist()
    return result


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Returns `step`, `test_accuracy`, `ensemble_accuracy` and `params_sha256` of a run's newest checkpoint.

    Raises:
        InputError: there is no run, no checkpoint, or the data is not what it was trained on.
    """
    config = read_config(run_dir)
    recipe = from_config(config)
    data_dir = recipe.data_dir or None
    dataset = data_source.load(recipe.data, data_dir=data_dir, fallback_dir=str(run_dir / "data"))
    if dataset.fingerprint != config.get("data", {}).get("fingerprint"):
        raise InputError(f"the data {recipe.data!r} is not what {run_dir} was trained on")
    if not (run_dir / "checkpoints").is_dir():
        raise InputError(f"no checkpoint in {run_dir}")
    learner = recipe.learner(dataset.num_classes, recipe.steps)
    example = data_source.batch_at(dataset.train, recipe.seed, 0, recipe.batch)
    shape = jax.eval_shape(lambda key: learner.init(key, example), jax.random.key(0))
    checkpoints = Checkpoints(run_dir)
    try:
        step, state = checkpoints.restore(shape)
    finally:
        checkpoints.close()
    result = evaluate_state(learner, state, dataset)
    return {
        "step": step,
        "test_accuracy": result["test_accuracy"],
        "ensemble_accuracy": result["ensemble_accuracy"],
        "params_sha256": params_sha256(state.params),
    }


def quiet_backend() -> None:
    """Keeps the backends' start-up chatter off stderr; for the command line only."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
