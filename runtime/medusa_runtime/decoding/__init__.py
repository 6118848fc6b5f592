"""Decoding: the loop that admits requests, chooses trees, runs steps and delivers tokens."""
