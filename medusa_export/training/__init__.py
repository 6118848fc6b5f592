"""Data, training and calibration of MEDUSA heads."""
