"""The JSON objects that the server reads and writes."""
