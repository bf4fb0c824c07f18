"""Verbs of the command line that this package adds to `clipdit bench`."""
