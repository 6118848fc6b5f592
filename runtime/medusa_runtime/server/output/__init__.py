"""Parsers of the model's text: reasoning and tool calls are told apart from the content, also while text streams."""
