"""Claims of the family `norm`."""
