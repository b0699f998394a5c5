"""Networks that teach each other.

Start with `deep_mutual_learning`: K networks, each learning from the labels and from the others' predictions.
"""

from jaxlab.mutual.deep_mutual_learning import deep_mutual_learning, mutual_kl
from jaxlab.mutual.mean_teacher import MeanTeacherState, consistency_loss, mean_teacher, ramp_up

__all__ = [
    "MeanTeacherState",
    "consistency_loss",
    "deep_mutual_learning",
    "mean_teacher",
    "mutual_kl",
    "ramp_up",
]
