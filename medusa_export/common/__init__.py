"""Files, errors and progress, used by all other packages."""
