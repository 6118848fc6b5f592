"""Processes, threads, clocks, and checks of numbers."""
