"""The loop: train a recipe, stop and go on exactly, evaluate what came out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.engine import data as data_source
from jaxlab.engine import files, guard, processes
from jaxlab.engine.checkpoint import Checkpoints, params_sha256
from jaxlab.engine.errors import BadNumbersError, InputError
from jaxlab.engine.log import MetricsLog, Progress, plain, read_rows
from jaxlab.engine.mesh import batch_sharding, check_divides, make_mesh, state_shardings
from jaxlab.engine.plots import save_plots
from jaxlab.engine.recipe import Recipe
from jaxlab.engine.recipes import from_config
from jaxlab.engine.signals import Stop
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


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    grace_seconds: float = 0.0,
    debug_nans: bool = False,
    profile: bool = False,
) -> Result:
    """Trains a recipe to its last step, or to the first interrupt, which saves.

    Args:
        recipe: what to train.
        run_dir: where everything goes.
        resume: go on from the newest good checkpoint in `run_dir`.
        quiet: no progress on stderr.
        grace_seconds: how long after SIGINT or SIGTERM the process may still take; 0 = as long as it needs.
        debug_nans: stop in the operation that first makes a NaN, with its traceback.
        profile: write a trace of a few steps to `<run_dir>/profile`, for TensorBoard and Perfetto.

    Raises:
        InputError: a field, the mesh, the data or the run directory does not fit.
        BadNumbersError: `recipe.bad_steps` steps in a row were not finite.
        SaveError: the last checkpoint could not be saved.
    """
    recipe.validate()
    if run_dir.exists() and any(run_dir.iterdir()) and not resume:
        raise InputError(f"{run_dir} is not empty: go on with --resume {run_dir}, or name another --run-dir")
    processes.start()
    mesh = make_mesh(recipe.mesh)
    for axis, name, value in recipe.divisions():
        check_divides(mesh, axis, name, value)
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    if mesh is None and processes.count() > 1:
        raise InputError(f"{processes.count()} processes need a --mesh over all of their {len(jax.devices())} devices")
    progress = Progress(recipe.steps, quiet=quiet or processes.index() > 0)
    where = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"
    progress.say(f"{recipe.name}: {recipe.title}; {recipe.data}, {recipe.steps} steps on {where}, {recipe.expected}")

    with Stop(grace_seconds) as stop, jax.debug_nans(True) if debug_nans else contextlib.nullcontext():
        dataset = data_source.load(recipe.data, data_dir=recipe.data_dir or None, fallback_dir=str(run_dir / "data"))
        size = len(dataset.train["y"])
        if recipe.batch > size:
            raise InputError(f"--batch {recipe.batch} is larger than the {size} training examples of {dataset.name}")
        config = config_of(recipe, dataset)
        if resume:
            saved = read_config(run_dir).get("data", {}).get("fingerprint")
            if saved != dataset.fingerprint:
                raise InputError(
                    f"the data {recipe.data!r} changed since {run_dir} was started: it cannot go on exactly"
                )
        elif processes.index() == 0:
            files.write(run_dir / "config.json", json.dumps(config, indent=1) + "\n")
        return _run(recipe, run_dir, dataset, config, mesh, stop, progress, resume, profile)


def _run(recipe, run_dir, dataset, config, mesh, stop, progress, resume, profile) -> Result:
    learner = recipe.learner(dataset.num_classes, recipe.steps)
    root = jax.random.key(recipe.seed)
    example = data_source.batch_at(dataset.train, recipe.seed, 0, recipe.batch)
    checkpoints = Checkpoints(run_dir, config=config, tell=progress.say)
    began = time.monotonic()
    progress.say("compiling")

    def init(key):
        return guard.start(learner.init(key, example))

    shape = jax.eval_shape(init, root)
    places = None if mesh is None else state_shardings(shape, mesh, fsdp=recipe.shard == "fsdp")
    goes_on = resume and checkpoints.latest() is not None
    if goes_on:
        start, carry = checkpoints.restore(_placed(shape, places))
    else:
        start, carry = 0, jax.jit(init, out_shardings=places)(root)
    place = None if mesh is None else batch_sharding(mesh)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    step_function = jax.jit(
        guard.train_step(learner, seed=recipe.seed, limit=recipe.bad_steps, mesh=mesh),
        donate_argnums=0,
        out_shardings=None if mesh is None else (places, everywhere),
    )
    profiler = Profiler(run_dir / "profile" if profile and processes.index() == 0 else None, start)
    log = MetricsLog(run_dir, resume_step=start if resume else None) if processes.index() == 0 else None
    report = Reporter(log, progress, recipe)
    progress.start = start
    step, run_step = start, None
    try:
        while step < recipe.steps and not _everyone_stops(stop, step, recipe):
            batch = data_source.batch_at(dataset.train, recipe.seed, step, recipe.batch)
            batch = jax.tree.map(lambda x: _shared_out(x, place), batch)
            number = _shared_out(np.int32(step), everywhere)
            if run_step is None:
                run_step, cost, report.names = _compiled(step_function, carry, batch, number)
                progress.say(f"compiled in {time.monotonic() - began:.0f} s: {cost}")
                progress.began = time.monotonic()
            profiler.before(step)
            # The host must not wait for the device in a step, as an implicit copy would; finding a NaN has to.
            with jax.transfer_guard("allow" if jax.config.jax_debug_nans else "disallow"):
                carry, metrics = run_step(carry, batch, number)
            step += 1
            profiler.after(step, metrics)
            report.add(step, metrics)
            if step % recipe.save_every == 0 and step < recipe.steps:
                report.flush()
                checkpoints.save(step, carry)
        report.flush()
        checkpoints.save(step, carry, wait=True)
        if step < recipe.steps:
            return Result(run_dir, step, False, {})
        evaluation = evaluate_state(learner, carry.learner, dataset)
        if log is not None:
            log.write(step, {name: v for name, v in evaluation.items() if name.startswith(("test_", "ensemble_"))})
    finally:
        profiler.close()
        if log is not None:
            log.close()
        checkpoints.close()
        progress.close()
    if processes.index() == 0:
        save_plots(run_dir, read_rows(run_dir / "metrics.jsonl"), evaluation)
    return Result(run_dir, step, True, evaluation)


def _compiled(step_function, carry, batch, number):
    """Compiles the step; also returns its work and memory on one device, in words, and the leaves that it checks."""
    traced = step_function.trace(carry, batch, number)
    compiled = traced.lower().compile()
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    memory = compiled.memory_analysis()
    state, temporary = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
    words = f"{flops / 1e9:.2f} GFLOP a step, {state:.1f} MiB of state and batch, {temporary:.1f} MiB of temporaries"
    # To find a NaN, JAX has to run the function itself, operation by operation.
    new, metrics = traced.out_info
    return (step_function if jax.config.jax_debug_nans else compiled), words, list(guard.checked(new.learner, metrics))


class Profiler:
    """Traces the steps after the first two, which are unlike the others.

    Args:
        directory: where the trace goes; None traces nothing.
        start: step at which the run begins.
    """

    STEPS = 5

    def __init__(self, directory: Path | None, start: int):
        self.directory, self.first, self.tracing = directory, start + 2, False

    def before(self, step: int) -> None:
        """Starts the trace when its first step is due."""
        if self.directory is not None and step == self.first:
            jax.profiler.start_trace(str(self.directory), create_perfetto_trace=True)
            self.tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """Ends the trace when its last step is done."""
        if self.tracing and step >= self.first + self.STEPS:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends the trace if it runs."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
            self.directory = None


class Reporter:
    """Writes rows and complains of bad steps once the device has their numbers, so that no step waits for the host.

    Args:
        log: where the rows go; None in processes that write nothing.
        progress: where lines go.
        recipe: knows how often a row is due, and how many bad steps in a row are too many.
    """

    AHEAD = 16

    def __init__(self, log: MetricsLog | None, progress: Progress, recipe: Recipe):
        self.log, self.progress, self.recipe = log, progress, recipe
        self.names: list[str] = []  # of the leaves that the entry `bad` of the metrics numbers, once there is a step
        self.waiting: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step, and handles those that have arrived."""
        due = step % self.recipe.log_every == 0 or step == self.recipe.steps
        self.waiting.append((step, metrics if due else {"bad": metrics["bad"]}))
        while self.waiting and (len(self.waiting) > self.AHEAD or self.waiting[0][1]["bad"].is_ready()):
            self._handle(*self.waiting.popleft())

    def flush(self) -> None:
        """Waits for everything that was added."""
        while self.waiting:
            self._handle(*self.waiting.popleft())

    def speed(self, step: int) -> str:
        """Returns the examples per second since compilation ended."""
        seconds = time.monotonic() - self.progress.began
        return f"{(step - self.progress.start) * self.recipe.batch / max(seconds, 1e-9):,.0f} examples/s"

    def _handle(self, step: int, metrics: dict[str, Any]) -> None:
        row = plain(jax.device_get(metrics))
        bad, in_row, skipped = row.pop("bad")
        if bad >= 0:
            self.progress.say(f"step {step}: {self.names[bad]} is not finite; the step was skipped")
        if row:
            if skipped:
                row["skipped_steps"] = skipped
            if self.log is not None:
                self.log.write(step, row)
            self.progress.update(step, f"{summary(row)}  {self.speed(step)}")
        if self.recipe.bad_steps and in_row >= self.recipe.bad_steps:
            last = f", last {self.names[bad]}" if bad >= 0 else ""
            raise BadNumbersError(
                f"stopped at step {step}: {in_row} steps in a row were not finite{last}; "
                f"the last checkpoint is good; --debug-nans finds the operation"
            )


def _placed(shape: Any, places: Any) -> Any:
    """Returns the shapes with the shardings that a restored state shall have."""
    if places is None:
        return shape
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shape, places)


def _shared_out(x: Any, place: NamedSharding | None) -> jax.Array:
    """Puts a host value that every process has on the devices, each process only its own part."""
    if place is None or processes.count() == 1:
        return jax.device_put(x, place)
    return jax.make_array_from_callback(np.shape(x), place, lambda index: np.asarray(x)[index])


def _everyone_stops(stop: Stop, step: int, recipe: Recipe) -> bool:
    """Tells whether to stop before this step; several processes ask each other only now and then, since that waits."""
    if processes.count() == 1:
        return stop.requested
    return step % min(recipe.log_every, 10) == 0 and processes.any_of(stop.requested)


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
    if processes.count() > 1:
        mesh = jax.tree.leaves(state)[0].sharding.mesh
        state = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(state)
        state = jax.tree.map(lambda leaf: leaf.addressable_data(0), state)
    state = jax.device_put(jax.device_get(state), jax.local_devices()[0])
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
    shape = jax.eval_shape(lambda key: guard.start(learner.init(key, example)), jax.random.key(0))
    checkpoints = Checkpoints(run_dir, tell=lambda line: print(line, file=sys.stderr))
    try:
        step, carry = checkpoints.restore(shape)
    finally:
        checkpoints.close()
    state = carry.learner
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
