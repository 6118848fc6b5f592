"""Processes, threads and clocks."""
