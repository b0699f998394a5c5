"""The pictures of a run: learning curves of each peer, expert load per layer, confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def save_plots(run_dir: Path, rows: list[dict[str, Any]], result: dict[str, Any]) -> list[Path]:
    """Draws the plots of a run as PNG.

    Args:
        run_dir: directory of the run; the plots go to `<run_dir>/plots`.
        rows: rows of `metrics.jsonl`.
        result: what `evaluate` returned.

    Returns:
        The files written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    written = []

    def save(figure: Figure, name: str) -> None:
        FigureCanvasAgg(figure)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=110)
        written.append(path)

    curve = [row for row in rows if "loss" in row]
    if curve:
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        panels = [n for n in ("loss", "accuracy", "mutual_kl", "mutual", "consistency") if n in curve[0]]
        for axes, name in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            steps = [row["step"] for row in curve]
            values = np.array([np.atleast_1d(row[name]) for row in curve])
            for k in range(values.shape[1]):
                axes.plot(steps, values[:, k], label=f"peer {k}", linewidth=1.2)
            axes.set(title=name.replace("_", " "), xlabel="step")
            axes.grid(alpha=0.3)
        np.atleast_1d(figure.axes)[0].legend()
        save(figure, "learning_curves")

    if curve and "agreement" in curve[0]:
        steps, together = [row["step"] for row in curve], [row["ensemble_accuracy"] for row in curve]
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(steps, [row["agreement"] for row in curve], color="black", linewidth=1.2)
        left.set(title="batches on which all peers agree", xlabel="step", ylim=(0, 1.02))
        for k, values in enumerate(zip(*(row["accuracy"] for row in curve), strict=True)):
            right.plot(steps, values, label=f"peer {k}", linewidth=1.0)
        right.plot(steps, together, label="together", color="black", linewidth=1.6)
        right.set(title="accuracy on the batches", xlabel="step")
        right.legend()
        for axes in (left, right):
            axes.grid(alpha=0.3)
        save(figure, "agreement")

    if "expert_counts" in result:
        counts = np.asarray(result["expert_counts"], float)
        peers, depth, experts = counts.shape
        load = counts * experts / np.maximum(counts.sum(-1, keepdims=True), 1)
        figure = Figure(figsize=(3.2 * peers + 1, 0.7 * depth + 1.6), layout="constrained")
        grid = np.atleast_1d(figure.subplots(1, peers))
        for k, axes in enumerate(grid):
            image = axes.imshow(load[k], vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
            axes.set(title=f"peer {k}", xlabel="expert", ylabel="layer", xticks=range(experts), yticks=range(depth))
            for i in range(depth):
                for j in range(experts):
                    axes.text(j, i, f"{load[k, i, j]:.2f}", ha="center", va="center", fontsize=8)
        figure.colorbar(image, ax=list(grid), label="load / ideal")
        save(figure, "expert_load")

    matrix = np.asarray(result["confusion"])
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.log1p(matrix), cmap="Blues")
    axes.set(title="test set, ensemble of the peers", xlabel="predicted", ylabel="true")
    axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            if matrix[i, j]:
                colour = "white" if i == j else "black"
                axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7, color=colour)
    save(figure, "confusion")
    return written
