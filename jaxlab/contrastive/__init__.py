"""Contrastive losses over embeddings `[N, D]`.

Start with `info_nce_loss`: rows of two arrays that belong together attract, all other pairs repel.
"""

from jaxlab.contrastive.info_nce import info_nce_loss

__all__ = ["info_nce_loss"]
