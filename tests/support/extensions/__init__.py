"""Extensions that live outside the package, as a user would write them: each is one file and one registration."""
