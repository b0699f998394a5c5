"""What every recipe has: the flags of a run, and how its parts are built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxlab.engine.errors import InputError, did_you_mean
from jaxlab.types import Layer, Learner, StatefulLayer

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What every recipe has: the flags of a run, and how a learner is built.

    Attributes:
        data: `digits`, `tfds:NAME` or a folder or file of `.npz`.
        data_dir: where prepared TFDS data sets lie.
        steps: optimiser steps.
        batch: examples per step.
        seed: decides initialisation, data order and augmentation.
        mesh: `data=2,expert=4`; empty = one device.
        save_every: steps between checkpoints.
        log_every: steps between rows of the metrics.
        accumulate: steps whose gradients are averaged before one update of the parameters.
        compute: `float32`, or `bfloat16` for activations and products while the parameters stay in float32.
        shard: `replicated`, or `fsdp`, which spreads parameters and optimiser state over the mesh axis `data`.
        bad_steps: steps in a row whose loss or state is not finite that end the run; each is skipped. 0 = no end.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    expected: ClassVar[str] = ""

    data: str = "digits"
    data_dir: str = ""
    steps: int = 1000
    batch: int = 128
    seed: int = 0
    mesh: str = ""
    save_every: int = 250
    log_every: int = 25
    accumulate: int = 1
    compute: str = "float32"
    shard: str = "replicated"
    bad_steps: int = 10

    def validate(self) -> None:
        """Raises an InputError for a field that makes no sense."""
        for field in ("steps", "batch", "save_every", "log_every", "accumulate"):
            if getattr(self, field) < 1:
                raise InputError(f"--{field.replace('_', '-')} must be at least 1, got {getattr(self, field)}")
        for field, choices in (("compute", ("float32", "bfloat16")), ("shard", ("replicated", "fsdp"))):
            word = getattr(self, field)
            if word not in choices:
                hint = did_you_mean(word, choices)
                raise InputError(f"--{field} must be {' or '.join(choices)}, got {word!r}{hint}")
        if self.bad_steps < 0:
            raise InputError(f"--bad-steps must be at least 0, got {self.bad_steps}")

    def divisions(self) -> list[tuple[str, str, int]]:
        """Returns what a mesh axis has to divide: `(axis, field, value)`."""
        return [("data", "batch", self.batch)]

    def accumulated(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns the optimiser, updating once every `accumulate` steps with the mean of their gradients."""
        import optax

        if self.accumulate == 1:
            return optimizer
        return optax.MultiSteps(optimizer, self.accumulate).gradient_transformation()

    def computed(self, net: Layer | StatefulLayer) -> Layer | StatefulLayer:
        """Returns the network, computing in the dtype that `compute` names."""
        from jaxlab import nn

        return net if self.compute == "float32" else nn.with_compute_dtype(net, self.compute)

    def learner(self, num_classes: int, steps: int) -> Learner:
        """Returns the learner of this recipe."""
        raise TypeError(f"recipe {self.name} builds no learner")

    def prepared(self) -> Recipe:
        """Returns the recipe with its data made, where it makes its own."""
        return self

    def report(self, run_dir: Path, evaluation: dict[str, Any]) -> list[str]:
        """Returns what a finished run says, in lines; may draw into `run_dir`."""
        accuracy = ", ".join(f"{100 * a:.1f}%" for a in evaluation["test_accuracy"])
        together = 100 * evaluation["ensemble_accuracy"]
        return [f"test accuracy of the peers: {accuracy}; together {together:.1f}%"]
