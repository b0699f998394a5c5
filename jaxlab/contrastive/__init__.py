"""Losses that pull views of one example together and push other examples away.

Start with `info_nce_loss` (two views, one direction) or `nt_xent_loss` (SimCLR: any number of views, all directions).
`groco_multiview_loss` orders positives before the hardest negatives instead of a softmax over all of them: try it where
nearest neighbours are what you use the embeddings for; `groco_loss` is the same with positives and negatives of your
own. All take `axis_name` and then use the negatives of all devices.
"""

from jaxlab.contrastive.groco import groco_loss, groco_multiview_loss
from jaxlab.contrastive.info_nce import info_nce_loss, nt_xent_loss

__all__ = ["groco_loss", "groco_multiview_loss", "info_nce_loss", "nt_xent_loss"]
