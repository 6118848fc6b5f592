"""Decoding: which requests run, which tree each step verifies, and the steps themselves."""
