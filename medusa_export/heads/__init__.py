"""MEDUSA heads: modules, files of every published format, and their writer."""
