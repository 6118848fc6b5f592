"""Rewrites: changes of a graph that keep what it computes, one per module."""
