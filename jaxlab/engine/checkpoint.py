"""Orbax behind one small class: save a state, find the newest step, restore it into the shape that is expected."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab.engine.errors import InputError


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
        keep: how many of the newest steps stay.
    """

    def __init__(self, run_dir: str | Path, *, keep: int = 2):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise InputError("checkpoints need the extra `train`: pip install 'jaxlab[train]'") from error
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every phase of every save
        self._ocp = ocp
        self.directory = (Path(run_dir) / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def latest(self) -> int | None:
        """Returns the newest committed step, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, *, wait: bool = False) -> None:
        """Saves the state of a step in the background; a step that is already there is left alone."""
        if self._manager.latest_step() == step:
            return
        self._manager.save(step, args=self._ocp.args.Composite(state=self._ocp.args.StandardSave(state)))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when all saves are committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Commits what is under way and frees the background threads."""
        self.wait()
        self._manager.close()

    def restore(self, target: Any, *, step: int | None = None) -> tuple[int, Any]:
        """Returns `(step, state)` with the structure, dtypes and shardings of `target`.

        Args:
            target: pytree of arrays or `jax.ShapeDtypeStruct`s.
            step: which step; the newest by default.

        Raises:
            InputError: no checkpoint, or one of another model (the first three leaves that differ are named).
        """
        step = self.latest() if step is None else step
        if step is None:
            raise InputError(f"no checkpoint in {self.directory}")
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, target)
        self._refuse_other_model(abstract)
        restored = self._manager.restore(
            step, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract))
        )
        return step, restored["state"]

    def _refuse_other_model(self, abstract: Any) -> None:
        saved = self._saved_leaves()
        if saved is None:
            return
        expected = {path: tuple(leaf.shape) for path, leaf in leaf_paths(abstract).items()}
        different = [
            f"{path}: {saved.get(path, 'absent')} saved, {expected.get(path, 'absent')} expected"
            for path in sorted(saved.keys() | expected.keys())
            if saved.get(path) != expected.get(path)
        ]
        if different:
            raise InputError("the checkpoint is of another model: " + "; ".join(different[:3]))

    def _saved_leaves(self) -> dict[str, tuple[int, ...]] | None:
        file = self.directory.parent / "leaves.json"
        if not file.exists():
            return None
        return {name: tuple(shape) for name, shape in json.loads(file.read_text()).items()}

    def describe(self, state: Any) -> None:
        """Writes the shapes of the state beside the checkpoints, so that another model can be refused by name."""
        shapes = {path: list(np.shape(leaf)) for path, leaf in leaf_paths(state).items()}
        (self.directory.parent / "leaves.json").write_text(json.dumps(shapes, indent=1))
