"""Tables of the paper and beyond, each from one recipe: every row on the same splits and seeds."""
