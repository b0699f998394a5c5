"""Networks that teach each other.

Start with `deep_mutual_learning`: K networks, each learning from the labels and from the others' predictions.
"""

from jaxlab.mutual.attentive_waveblock import (
    cbam,
    cluster_pseudo_labels,
    complementarity,
    mutual_mean_teaching,
    nonlocal_block,
    soft_triplet_loss,
    waveblock,
)
from jaxlab.mutual.deep_mutual_learning import deep_mutual_learning, mutual_kl, mutual_objective
from jaxlab.mutual.mean_teacher import MeanTeacherState, consistency_loss, mean_teacher, ramp_up
from jaxlab.mutual.peers import peers

__all__ = [
    "MeanTeacherState",
    "cbam",
    "cluster_pseudo_labels",
    "complementarity",
    "consistency_loss",
    "deep_mutual_learning",
    "mean_teacher",
    "mutual_kl",
    "mutual_mean_teaching",
    "mutual_objective",
    "nonlocal_block",
    "peers",
    "ramp_up",
    "soft_triplet_loss",
    "waveblock",
]
