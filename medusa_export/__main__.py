"""``python -m medusa_export``."""

from medusa_export.cli import main

main(prog_name="medusa-export")
