"""Networks that teach each other.

Start with `deep_mutual_learning`: K networks, each learning from the labels and from the others' predictions.
"""

from jaxlab.mutual.deep_mutual_learning import deep_mutual_learning, mutual_kl

__all__ = ["deep_mutual_learning", "mutual_kl"]
