"""``python -m medusa_runtime.server``."""

from medusa_runtime.server.cli import main

if __name__ == "__main__":
    main()
