"""Checkpoints that a manifest commits, that are verified when read, and passed over when damaged.

    <run>/checkpoints/<step>/...            what Orbax writes, each process its share
    <run>/checkpoints/<step>/manifest.json  written last, by process 0: size and SHA-256 of every file, the shape and
                                            dtype of every leaf, the configuration of the run

A step directory without a manifest does not count. Nothing here renames or appends, because object stores cannot.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab.engine import processes
from jaxlab.engine.errors import InputError, SaveError

MANIFEST = "manifest.json"


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their path, in a fixed order."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat))


def params_sha256(params: Any) -> str:
    """Returns the SHA-256 over the path, dtype, shape and bytes of every leaf, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in leaf_paths(params).items():
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path}:{array.dtype}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run, in `<run>/checkpoints`.

    Args:
        run_dir: directory of the run.
        config: configuration of the run, kept in every manifest.
        keep: how many of the newest steps stay.
        tell: called with one plain line about a checkpoint that is damaged or could not be saved.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        config: dict[str, Any] | None = None,
        keep: int = 2,
        tell: Callable[[str], None] = lambda line: None,
    ):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise InputError("checkpoints need the extra `train`: pip install 'jaxlab[train]'") from error
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every phase of every save
        self._args, self._orbax = ocp.args, ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._config, self._keep, self._tell = config, keep, tell
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[int] = set()
        self.directory = (Path(run_dir) / "checkpoints").absolute()

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending; whether their bytes are still right only `restore` finds out."""
        if not self.directory.is_dir():
            return []
        found = (path for path in self.directory.iterdir() if path.name.isdecimal())
        return sorted(int(path.name) for path in found if (path / MANIFEST).is_file())

    def latest(self) -> int | None:
        """Returns the newest committed step, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, *, wait: bool = False) -> None:
        """Saves the state of a step in the background; a step that is already there is left alone.

        A save that fails costs that checkpoint and one line, not the run, unless `wait` asks for certainty.

        Raises:
            SaveError: `wait` is set and the step could not be committed.
        """
        self.wait()
        directory = self.directory / str(step)
        if processes.agree(step in self.steps() and step not in self._damaged):
            return
        self._error = None
        if processes.index() == 0:
            for bad in {step, *self._damaged}:
                _remove(self.directory, bad)
        self._damaged.clear()
        processes.barrier("jaxlab-save")
        try:
            self._orbax.save(directory, args=self._args.StandardSave(state))
        except Exception as error:  # a full disk shows in many types
            self._error = error
        leaves = {path: [list(np.shape(leaf)), str(leaf.dtype)] for path, leaf in leaf_paths(state).items()}
        self._thread = threading.Thread(target=self._commit, args=(step, leaves))
        self._thread.start()
        if wait:
            self.wait()
            if self._error is not None:
                raise SaveError(f"the checkpoint of step {step} could not be saved: {_plain(self._error)}")

    def wait(self) -> None:
        """Returns when the save under way is committed or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Ends the save under way and frees the background threads."""
        self.wait()
        self._orbax.close()

    def restore(self, target: Any) -> tuple[int, Any]:
        """Returns `(step, state)` with the structure, dtypes and shardings of `target`, from the newest good step.

        Args:
            target: pytree of arrays or `jax.ShapeDtypeStruct`s.

        Raises:
            InputError: no good checkpoint, or one of another model (the first three leaves that differ are named).
        """
        import orbax.checkpoint as ocp

        self.wait()
        last = "none was committed"
        for step in reversed(self.steps()):
            directory = self.directory / str(step)
            problem = damage(directory) if processes.index() == 0 else None
            if not processes.agree(problem is None):
                last = f"the checkpoint of step {step} is damaged: {problem or 'process 0 knows more'}"
                self._damaged.add(step)
                self._tell(last)
                continue
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
            _refuse_other_model(json.loads((directory / MANIFEST).read_text())["leaves"], abstract)
            return step, self._orbax.restore(directory, args=self._args.StandardRestore(abstract))
        raise InputError(f"no good checkpoint in {self.directory}: {last}")

    def _commit(self, step: int, leaves: dict[str, list]) -> None:
        """Runs in the background: waits for the bytes, writes the manifest, forgets the oldest steps."""
        directory = self.directory / str(step)
        try:
            if self._error is None:
                self._orbax.wait_until_finished()
                if processes.index() == 0:
                    text = json.dumps({"step": step, "files": _digests(directory), "leaves": leaves,
                                       "config": self._config})  # fmt: skip
                    (directory / MANIFEST).write_text(text)
        except Exception as error:
            self._error = error
        if self._error is not None:
            self._tell(f"the checkpoint of step {step} could not be saved: {_plain(self._error)}")
        if processes.index() == 0:
            if self._error is not None:
                _remove(self.directory, step)
            for old in self.steps()[: -self._keep]:
                _remove(self.directory, old)


def damage(directory: Path) -> str | None:
    """Returns what is wrong with a committed step in a few words, None if every file is what it was."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, (size, sha256) in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _sha256(path) != sha256:
            return f"{name} has other bytes than were saved"
    return None


def _digests(directory: Path) -> dict[str, list]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(directory).as_posix(): [path.stat().st_size, _sha256(path)] for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(directory: Path, step: int) -> None:
    """Deletes a step and what an interrupted save of it left; the manifest goes first, so that no half of it counts."""
    (directory / str(step) / MANIFEST).unlink(missing_ok=True)
    for path in [directory / str(step), *directory.glob(f"{step}.orbax-checkpoint-tmp*")]:
        shutil.rmtree(path, ignore_errors=True)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_other_model(saved: dict[str, list], abstract: Any) -> None:
    expected = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaf_paths(abstract).items()}

    def words(leaf):
        return "absent" if leaf is None else f"{leaf[1]} {tuple(leaf[0])}"

    different = [
        f"{path}: {words(saved.get(path))} saved, {words(expected.get(path))} expected"
        for path in sorted(saved.keys() | expected.keys())
        if saved.get(path) != expected.get(path)
    ]
    if different:
        raise InputError("the checkpoint is of another model: " + "; ".join(different[:3]))
