"""Acceptance: the rules that confirm nodes of a draft, and the search for the path to accept."""
