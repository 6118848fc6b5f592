"""Extensions, each of one file and one registration. The how-to pages show them."""
