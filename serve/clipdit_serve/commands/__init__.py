"""Verbs of the command line that this package brings."""
