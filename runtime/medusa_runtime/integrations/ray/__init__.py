"""Ray Serve: several replicas of a server on one or more machines.

``serve run medusa_runtime.integrations.ray:app bundle=FOLDER`` runs it. Ray starts and stops replicas by load, and
sends prompts with the same start to the same replica.
"""

from __future__ import annotations

from medusa_runtime.errors import MedusaError

try:
    import fastapi  # noqa: F401
    import ray.serve  # noqa: F401
except ModuleNotFoundError as error:
    raise MedusaError(f"{error.name} is not installed: pip install 'medusa-export[ray]'.") from error

from medusa_runtime.integrations.ray.application import app, build_app
from medusa_runtime.integrations.ray.options import Scaling
from medusa_runtime.server.settings import Settings

__all__ = ["Scaling", "Settings", "app", "build_app"]
