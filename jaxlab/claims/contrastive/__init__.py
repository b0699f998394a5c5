"""Claims of the family `contrastive`."""
