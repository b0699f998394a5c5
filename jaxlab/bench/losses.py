"""Every loss that people import, forward and backward, against the PyTorch form they would pick, where it is installed.

The peers are those of `pytorch-metric-learning` on the same number of threads; without it their column is empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import contrastive, information
from jaxlab.bench.runner import Contest

Peer = tuple[str, Callable[..., Any]] | None


def losses(quick: bool) -> Iterator[Contest]:
    """A batch of 1024 pairs of embeddings of width 128, in 64 classes; value and gradient."""
    rows, width = (32, 8) if quick else (1024, 128)
    rng = np.random.default_rng(0)
    views = jnp.asarray(rng.normal(size=(2, rows, width)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, rows // 16, rows), jnp.int32)
    pairs = np.stack([np.arange(rows)] * 2)

    def scores(v):
        return v[0] @ v[1].T / width

    on_views = {
        "info_nce_loss": (lambda v: contrastive.info_nce_loss(v[0], v[1]), None, None),
        "nt_xent_loss": (contrastive.nt_xent_loss, "NTXentLoss", pairs),
        "hard_contrastive_loss": (lambda v: contrastive.hard_contrastive_loss(v[0], v[1]), None, None),
        "simple_contrastive_loss": (lambda v: contrastive.simple_contrastive_loss(v[0], v[1]), None, None),
        "groco_multiview_loss": (contrastive.groco_multiview_loss, None, None),
        "matryoshka_contrastive_loss": (
            lambda v: contrastive.matryoshka_contrastive_loss(v[0], v[1], dims=(width // 4, width // 2, width)),
            None,
            None,
        ),
        "donsker_varadhan_bound": (lambda v: -information.donsker_varadhan_bound(scores(v)), None, None),
        "info_nce_bound": (lambda v: -information.info_nce_bound(scores(v)), None, None),
        "jensen_shannon_bound": (lambda v: -information.jensen_shannon_bound(scores(v)), None, None),
        "nwj_bound": (lambda v: -information.nwj_bound(scores(v)), None, None),
    }
    for name, (loss, peer, ids) in on_views.items():
        yield _contest(name, loss, views, peer, None if ids is None else ids.reshape(-1))
    ours = lambda v: contrastive.supervised_contrastive_loss(v[0], labels)
    yield _contest("supervised_contrastive_loss", ours, views[:1], "SupConLoss", np.asarray(labels))


def _contest(name: str, loss: Callable[[Any], Any], views: Any, peer: str | None, ids: np.ndarray | None) -> Contest:
    params = {"rows": views.shape[1], "width": views.shape[2], "pass": "fwd_bwd"}
    foreign = None if peer is None or ids is None else _metric_learning(peer, views, ids)
    return Contest(name, params, jax.value_and_grad(loss), (views,), foreign, foreign=foreign is not None)


def _metric_learning(name: str, views: Any, ids: np.ndarray) -> Peer:
    """Returns a loss of pytorch-metric-learning at temperature 0.1 as a callable that does one step, if it is there."""
    if find_spec("torch") is None or find_spec("pytorch_metric_learning") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]
    from pytorch_metric_learning import losses as theirs  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loss = getattr(theirs, name)(temperature=0.1)
    x = torch.tensor(np.asarray(views).reshape(len(ids), -1), requires_grad=True)
    labels = torch.tensor(ids)

    def step() -> None:
        x.grad = None
        loss(x, labels).backward()

    return f"pytorch-metric-learning {name}", step


BENCHES: dict[str, Callable[[bool], Iterator[Contest]]] = {"losses": losses}
