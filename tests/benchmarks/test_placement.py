"""Where ONNX Runtime puts nodes, as read from its log."""

from __future__ import annotations

from medusa_export.benchmarks.placement import nodes_elsewhere, parsed
from medusa_runtime import Bundle

LOG = """
[I:onnxruntime:, transformer_memcpy.cc:393 AddCopyNode] Add MemcpyFromHost after sub_3 for CUDAExecutionProvider
[I:onnxruntime:, transformer_memcpy.cc:393 AddCopyNode] Add MemcpyToHost before Gather for CUDAExecutionProvider
[V:onnxruntime:, session_state.cc:1577 VerifyEachNodeIsAssignedToAnEp] Node placements
[V:onnxruntime:, session_state.cc:1584 VerifyEachNodeIsAssignedToAnEp]  Node(s) placed on [CPUExecutionProvider]. Number of nodes: 3
[V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   Squeeze (node_sym_size_int_21)
[V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   Min (node_sym_min)
[V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   Squeeze (node_sym_size_int_25)
[V:onnxruntime:, session_state.cc:1584 VerifyEachNodeIsAssignedToAnEp]  Node(s) placed on [CUDAExecutionProvider]. Number of nodes: 1
[V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   MatMul (node_linear)
"""  # noqa: E501  # lines of a log


def test_nodes_and_copies_are_counted() -> None:
    assert parsed(LOG, "CUDAExecutionProvider") == {"Memcpy": 2, "Squeeze": 2, "Min": 1}
    assert parsed(LOG, "CPUExecutionProvider") == {"Memcpy": 2, "MatMul": 1}


def test_a_session_on_the_cpu_has_no_nodes_elsewhere(tiny_bundle: Bundle) -> None:
    assert nodes_elsewhere(tiny_bundle, "CPUExecutionProvider") == {}
