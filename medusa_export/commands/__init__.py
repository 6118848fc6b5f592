"""One module per subcommand; each has a ``command`` and imports heavy packages only when it runs."""
