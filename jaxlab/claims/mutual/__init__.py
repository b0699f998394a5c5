"""Claims of the family `mutual`."""
