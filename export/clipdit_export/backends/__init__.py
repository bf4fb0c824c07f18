"""The backends that open a bundle: one way through the parts, and for each runtime how it loads and calls a graph."""
