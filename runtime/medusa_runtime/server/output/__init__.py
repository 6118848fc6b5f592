"""Parsers of the model's text: they separate reasoning and tool calls from the content, also while text streams."""
