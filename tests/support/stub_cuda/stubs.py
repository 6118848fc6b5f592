"""Compiles stubs of the libraries that a CUDA library links to."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

SOURCES = Path(__file__).parent
# Libraries without versions of symbols, and one that is opened by name at run time.
_UNVERSIONED, _CUDNN = ("libcuda.so.1", "libcurand.so.10"), "libcudnn.so.9"


def build_stubs(library: Path, folder: Path, compiler: str) -> None:
    """Compiles a stub of each CUDA library that a library needs.

    Args:
        library: The library that is to be loaded, such as ONNX Runtime's CUDA provider.
        folder: The folder to write to; ``LD_LIBRARY_PATH`` must name it when the library is loaded.
        compiler: The C compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, symbols in _needed(library).items():
        source = SOURCES / ("cudart.c" if name.startswith("libcudart") else "cublas.c")
        written = set(re.findall(r"^[\w *]*?\b(\w+)\(", source.read_text(), flags=re.MULTILINE))
        own = f'#include "{source}"\n' if written & symbols else ""
        rest = "".join(_returning_zero(symbol) for symbol in sorted(symbols - (written if own else set())))
        unit = folder / f"{name}.c"
        unit.write_text(own + rest)
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-w",
            "-O1",
            "-o",
            str(folder / name),
            str(unit),
            f"-Wl,-soname,{name}",
        ]
        if name not in (*_UNVERSIONED, _CUDNN):
            (folder / f"{name}.map").write_text(f"{name} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={folder / name}.map")
        subprocess.run(command, check=True)
    (folder / "libcudnn.so").unlink(missing_ok=True)
    (folder / "libcudnn.so").symlink_to(_CUDNN)


def _needed(library: Path) -> dict[str, set[str]]:
    """The symbols that a library needs, by the CUDA library that has them."""
    found: dict[str, set[str]] = defaultdict(set, {name: set() for name in _UNVERSIONED})
    undefined = _lines("nm", "-D", "--undefined-only", str(library))
    for line in undefined:
        match = re.match(r"\s*U ((?:cuda|__cuda|cublas|curand|cu[A-Z])\w*)(?:@(\S+))?$", line)
        if match:
            found[match[2] or _UNVERSIONED[0]].add(match[1])
    # cuDNN is opened at run time, and its functions are looked up by name.
    found[_CUDNN] = {text for text in _lines("strings", "-a", str(library)) if re.fullmatch(r"cudnn[A-Z]\w+", text)}
    return found


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _returning_zero(symbol: str) -> str:
    if symbol.startswith("cudnnCreate"):
        return f"int {symbol}(void **handle) {{ *handle = (void *)64; return 0; }}\n"
    return f"int {symbol}(void) {{ return 0; }}\n"
