"""Claims of the family `information`."""
