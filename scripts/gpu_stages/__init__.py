"""Stages of the GPU check. Each runs in a process of its own, under a time limit, and writes its own report."""
