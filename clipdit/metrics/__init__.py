"""Metrics of translated images. Each carries the name of its network; none is reported under another's name (docs/metrics.md)."""
