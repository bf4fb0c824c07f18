"""Latency of a running service against load: what callers meet who do not wait for one another.

measuring.py asks and counts, report.py shows, process.py starts a service where none runs yet.
"""
