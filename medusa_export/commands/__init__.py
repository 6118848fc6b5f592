"""Commands, one module each: a ``command`` parses options, calls the Python API, and prints the result."""
