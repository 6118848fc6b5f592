"""The number of replicas and the resources of each, and the arguments of ``serve run``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medusa_runtime.integrations.settings import names_of, read_fields
from medusa_runtime.server.settings import SettingError, Settings


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Number and resources of the replicas.

    Attributes:
        min_replicas: Replicas that always run.
        max_replicas: The most replicas. Ray starts more when the requests per replica exceed its rows.
        cpus: CPUs that Ray reserves for each replica, and threads of its steps unless ``threads`` is set.
        gpus: GPUs of each replica: 1 for a compiled engine.
        ingresses: Processes that receive requests and forward them to replicas.
        prefix_bytes: Bytes at the start of a prompt that choose its replica.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cpus: int = 1
    gpus: int = 0
    ingresses: int = 1
    prefix_bytes: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("min_replicas", 1), ("cpus", 1), ("gpus", 0), ("ingresses", 1), ("prefix_bytes", 1)):
            if getattr(self, name) < least:
                raise SettingError(f"`{name}` is {getattr(self, name)}: expected a number of at least {least}.")
        if self.max_replicas < self.min_replicas:
            raise SettingError(
                f"`max_replicas` is {self.max_replicas}: expected at least `min_replicas`, {self.min_replicas}."
            )


def read_arguments(arguments: Mapping[str, object]) -> tuple[Settings, Scaling]:
    """The options in the arguments of an application, and API keys in ``MEDUSA_API_KEYS`` as for a server.

    Args:
        arguments: Values by name, as text or in their own type. Lists may be text with commas.

    Raises:
        SettingError: A name is unknown, a value can't be used, or ``bundle`` is missing.
    """
    known = names_of(Settings) | names_of(Scaling)
    if unknown := sorted(arguments.keys() - known):
        raise SettingError(f"There is no option `{unknown[0]}`: an application has {', '.join(sorted(known))}.")
    if "bundle" not in arguments:
        raise SettingError("The bundle is missing: add bundle=FOLDER to the arguments.")
    scaling = {name: arguments[name] for name in arguments.keys() & names_of(Scaling)}
    settings = {name: arguments[name] for name in arguments.keys() - scaling.keys()}
    settings.setdefault("api_keys", os.environ.get("MEDUSA_API_KEYS", ""))  # arguments are shown by Ray
    return read_fields(Settings, settings), read_fields(Scaling, scaling)


def absolute(settings: Settings) -> Settings:
    """Settings that mean the same in a process with another working directory.

    Raises:
        SettingError: There is no folder at the bundle's path.
    """
    bundle = Path(settings.bundle).expanduser().absolute()
    if not bundle.is_dir():
        raise SettingError(
            f"There is no bundle at {bundle}: give the path of a folder that every node of the cluster has, this one "
            "included."
        )
    return dataclasses.replace(settings, bundle=bundle, model_names=dataclasses.replace(settings, bundle=bundle).names)
