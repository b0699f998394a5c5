"""What a run tells: progress on stderr, rows in `metrics.jsonl`, TensorBoard events."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.engine import files


def plain(value: Any) -> Any:
    """Returns the value as JSON types; arrays become numbers or lists."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Progress:
    """A progress bar on a terminal, otherwise a line every ten seconds; silent if quiet.

    Args:
        total: steps of the run.
        start: steps already done.
        quiet: says nothing.
    """

    def __init__(self, total: int, *, start: int = 0, quiet: bool = False):
        self.total, self.start, self.quiet = total, start, quiet
        self.began = self.told = time.monotonic()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", file=sys.stderr, leave=False)

    def say(self, text: str) -> None:
        """Prints one line."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def update(self, step: int, text: str) -> None:
        """Shows that `step` is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.told >= 10:
            self.told = time.monotonic()
            left = (self.told - self.began) / max(1, step - self.start) * (self.total - step)
            self.say(f"step {step}/{self.total}  {text}  about {left:.0f} s left")

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


class MetricsLog:
    """Rows of metrics, appended to `metrics.jsonl` and to TensorBoard's event file.

    Args:
        run_dir: directory of the run.
        resume_step: rows after this step are dropped, because they will be made again; None starts afresh.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None):
        from tensorboardX import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        rows = [] if resume_step is None else [row for row in read_rows(self.path) if row["step"] <= resume_step]
        rows = [row for row in rows if "test_accuracy" not in row or row["step"] < (resume_step or 0)]
        files.write(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a")
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one row."""
        row = {"step": step, **plain(metrics)}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items():
            if name == "step":
                continue
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)
            elif isinstance(value, list) and all(isinstance(v, (int, float)) for v in value):
                for k, v in enumerate(value):
                    self.writer.add_scalar(f"{name}/peer_{k}", v, step)

    def close(self) -> None:
        """Flushes everything."""
        self.file.close()
        self.writer.close()
