"""Claims of the family `moe`."""
