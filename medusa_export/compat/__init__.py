"""Patches of libraries, and uses of their private parts: one module per library.

Each module says which versions it was tried with, and what happens without it.
"""
