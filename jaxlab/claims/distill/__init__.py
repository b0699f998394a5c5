"""Claims of the family `distill`."""
