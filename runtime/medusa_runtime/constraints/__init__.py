"""What a request demands of its tokens besides the model's choice: biases, bans, penalties and grammars."""
