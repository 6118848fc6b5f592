"""Where ONNX Runtime puts the nodes of a bundle's graph: on the device, or on the CPU."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter

from medusa_runtime.backends.onnxruntime.session import CUDA, cuda_graph, import_onnxruntime, open_session
from medusa_runtime.bundles.bundle import Bundle

_HEADING = re.compile(r"(?:All nodes|Node\(s\)) placed on \[(\w+)\]")
_NODE = re.compile(r"\]\s{2,}(\w+) \(")


def nodes_elsewhere(bundle: Bundle, provider: str = CUDA) -> dict[str, int]:
    """Counts the nodes that a provider leaves to others, by operator, and the copies ``Memcpy`` between them.

    ONNX Runtime says where nodes are in its verbose log alone, which it writes to the standard error of the process.

    Args:
        bundle: The bundle.
        provider: ONNX Runtime's name of the execution provider.

    Raises:
        BackendError: The provider can't be started.
    """
    ort = import_onnxruntime()
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        ort.set_default_logger_severity(0)
        try:
            open_session(bundle, cuda_graph(bundle), threads=1, provider=provider)
        finally:
            ort.set_default_logger_severity(2)
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        return parsed(log.read().decode(errors="replace"), provider)


def parsed(log: str, provider: str) -> dict[str, int]:
    """Counts nodes and copies as ``nodes_elsewhere`` does, in the log of a session that was opened."""
    counts: Counter[str] = Counter()
    place = ""
    for line in log.splitlines():
        heading = _HEADING.search(line)
        if heading:
            place = heading[1]
        elif place and place != provider:
            node = _NODE.search(line)
            counts.update([node[1]] if node else [])
        if "Add Memcpy" in line:
            counts["Memcpy"] += 1
    return dict(counts)
