"""An HTTP server with OpenAI's API over a ``MedusaService``: ``python -m medusa_runtime.server BUNDLE``."""
