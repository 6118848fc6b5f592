"""Draft trees by name and by search, and the calibrations that the search uses."""
