"""Claims of the family `mil`."""
