"""Draft trees: by name, by search, and the calibrations that they are chosen by."""
