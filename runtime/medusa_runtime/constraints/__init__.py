"""Constraints of requests on the tokens of their answers: biases, bans, penalties and grammars."""
