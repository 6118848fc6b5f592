"""A real Triton Inference Server on loopback: the program in the folder that ``scripts/triton.sh`` prints."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy

import medusa_runtime
from support.servers import free_port

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def missing() -> str | None:
    """The reason why no server can run here; None if one can."""
    folder = os.environ.get("MEDUSA_TRITON")
    if not folder:
        return "MEDUSA_TRITON names no Triton Inference Server: scripts/triton.sh gets one"
    try:
        ctypes.CDLL(f"libpython{VERSION}.so.1.0")  # the Python backend is linked to it
    except OSError:
        return f"Triton's Python backend needs libpython{VERSION}.so.1.0: install the system's package of it"
    return None


@contextmanager
def running(repository: Path, scratch: Path) -> Iterator[str]:
    """A context manager that serves a model repository. Gives the server's address.

    Args:
        repository: The model repository.
        scratch: A folder for what the server needs beside it.
    """
    folder = Path(os.environ["MEDUSA_TRITON"])
    server = folder / "pytriton" / "tritonserver"
    backends = scratch / "backends"
    shutil.copytree(server / "backends", backends)
    shutil.copy(server / "python_backend_stubs" / VERSION / "triton_python_backend_stub", backends / "python")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "nvidia_pytriton.libs"),
        "PATH": f"{_python(folder, scratch / 'venv')}:{os.environ['PATH']}",
    }
    port = free_port()
    command = [server / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}"]
    control = ["--model-control-mode=explicit", "--load-model=*"]
    options = [
        *control,
        f"--http-port={port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    log = scratch / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options, "--exit-timeout-secs=20"], env=environment, stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(address):
            assert process.poll() is None, log.read_text(errors="replace")
            time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text(errors="replace")


def _python(folder: Path, environment: Path) -> Path:
    """Makes an environment whose Python has this one's packages and NumPy 1, and gives its folder of programs."""
    venv.create(environment, symlinks=True)
    ours = [Path(module.__file__ or "").parents[1] for module in (medusa_runtime, numpy)]
    site = environment / "lib" / f"python{VERSION}" / "site-packages" / "ours.pth"
    site.write_text("\n".join(map(str, [folder, *ours])), encoding="utf-8")
    return environment / "bin"


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False
