"""Processes that end or fork with engines and services open. Each test runs a Python program of its own."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from medusa_runtime import Bundle, MedusaEngine, MedusaError
from medusa_runtime.backends.onnxruntime import session, session_backend
from medusa_runtime.common import processes as processes_module
from medusa_runtime.common.processes import ProcessBound, native_work

SERVICE = """
import asyncio, os, signal, sys, threading, time
from medusa_runtime import ForkError, MedusaEngine, MedusaError, MedusaService
service = MedusaService.load(sys.argv[1], rows=3, threads=2, tree_size=4)
handles = [service.submit([5 + i] * 400, max_new_tokens=100) for i in range(6)]
"""
ENGINE = """
import os, sys, threading, time
from medusa_runtime import ForkError, MedusaEngine, MedusaError
engine = MedusaEngine.load(sys.argv[1], threads=2)
def work():
    try:
        while True:
            engine.generate([5] * 400, max_new_tokens=100, tree_size=9)
    except MedusaError as error:
        assert "closed" in str(error) or "about to end" in str(error), error
"""


def run(program: str, folder: Path, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("time.sleep(0.05)", 0),
        ("next(handles[0]); sys.exit(3)", 3),
        pytest.param("time.sleep(0.02); raise ValueError('mine')", 1, marks=pytest.mark.slow),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM)", 5),
        ("stream = service.stream([9] * 300, max_new_tokens=200); next(stream)", 0),
        pytest.param(
            "service.submit([9] * 300, on_chunk=lambda _: time.sleep(0.001)); handles[0].result()",
            0,
            marks=pytest.mark.slow,
        ),
        pytest.param("threading.Thread(target=handles[5].result, daemon=True).start()", 0, marks=pytest.mark.slow),
        ("threading.Thread(target=lambda: print(len(handles[5].result().token_ids))).start()", 0),
        pytest.param("asyncio.run(asyncio.wait_for(service.agenerate([9] * 300), 0.01))", 1, marks=pytest.mark.slow),
        pytest.param(
            "threading.Thread(target=MedusaEngine.load, args=sys.argv[1:], daemon=True).start()",
            0,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "other = MedusaService.load(sys.argv[1], threads=2); other.submit([8] * 300)", 0, marks=pytest.mark.slow
        ),
        pytest.param("service.close()", 0, marks=pytest.mark.slow),
    ],
)
def test_a_program_that_ends_while_a_service_works(tiny_bundle: Bundle, ending: str, code: int) -> None:
    """Otherwise its thread would return from ONNX Runtime to an interpreter that has ended. That aborts the process."""
    ended = run(SERVICE + ending, tiny_bundle.folder)
    assert ended.returncode == code, ended.stderr
    assert "terminate" not in ended.stderr
    if "print" in ending:  # a thread that is no daemon gets its whole answer
        assert ended.stdout == "100\n"


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("threading.Thread(target=work, daemon=True).start(); time.sleep(0.2)", 0),
        pytest.param(
            "threading.Thread(target=work, daemon=True).start(); time.sleep(0.2); sys.exit(4)",
            4,
            marks=pytest.mark.slow,
        ),
        ("stream = engine.stream([5] * 300, max_new_tokens=100); next(stream)", 0),
        pytest.param(
            "[threading.Thread(target=work, daemon=True).start() for _ in range(4)]; time.sleep(0.2)",
            0,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_program_that_ends_while_an_engine_works(tiny_bundle: Bundle, ending: str, code: int) -> None:
    ended = run(ENGINE + ending, tiny_bundle.folder)
    assert (ended.returncode, ended.stderr) == (code, "")


FORK_SERVICE = (
    SERVICE
    + """
done = handles.pop(0)
expected = done.result().token_ids
session = service.session([{"role": "user", "content": "Hi"}])
half = service.stream([9] * 300, max_new_tokens=200)
next(half)
handles = [service.submit([5 + i] * 10, max_new_tokens=500, priority=1) for i in range(3)]
next(handles[0])
async def drained(items):
    return [item async for item in items]
calls = {
    "submit": lambda: service.submit([1]),
    "generate": lambda: service.generate([1], timeout=1),
    "stream": lambda: service.stream([1]),
    "agenerate": lambda: asyncio.run(service.agenerate([1])),
    "astream": lambda: asyncio.run(drained(service.astream([1]))),
    "drain": lambda: service.drain(),
    "close": lambda: service.close(),
    "load_figures": lambda: service.load_figures,
    "send": lambda: session.send("Hi"),
    "asend": lambda: asyncio.run(session.asend("Hi")),
    "result": lambda: handles[0].result(),
    "aresult": lambda: asyncio.run(handles[0].aresult()),
    "cancel": lambda: handles[0].cancel(),
    "chunks": lambda: next(handles[0]),
    "achunks": lambda: asyncio.run(drained(handles[0])),
    "half a stream": lambda: next(half),
}
def check(name):
    try:
        calls[name]()
    except ForkError as error:
        assert "spawn" in str(error), error
    else:
        raise AssertionError(name)
if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert all(len(handle.result(60).token_ids) == 500 for handle in handles)
    assert service.state == "ready"
    sys.exit(8)
with service, handles[0]:
    for name in calls:
        check(name)
    assert service.state == "failed" and isinstance(service.failure, ForkError)
    assert done.result().token_ids == expected and asyncio.run(done.aresult()).token_ids == expected
    done.cancel()
    grandchild = os.fork()
    check("submit")
    if grandchild:
        assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 7
    del service
    sys.exit(7)
"""
)
FORK_ENGINE = (
    ENGINE
    + """
expected = engine.generate([5] * 30, max_new_tokens=40, tree_size=4)
stream = engine.stream([5] * 30, max_new_tokens=40, tree_size=4)
next(stream)
finished = engine.stream([5] * 30, max_new_tokens=3, tree_size=4)
finished.result()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert engine.generate([5] * 30, max_new_tokens=40, tree_size=4) .token_ids == expected.token_ids
    sys.exit(8)
calls = [lambda: engine.generate([1]), lambda: engine.stream([1]), lambda: next(stream), stream.result, engine.close]
with engine:
    for call in calls:
        try:
            call()
        except ForkError as error:
            assert "spawn" in str(error), error
        else:
            raise AssertionError
    assert engine.state == "failed" and isinstance(engine.failure, ForkError)
    assert len(finished.result().token_ids) == 3
    del engine, stream, finished
    own = MedusaEngine.load(sys.argv[1], threads=2)
    assert own.generate([5] * 30, max_new_tokens=40, tree_size=4).token_ids == expected.token_ids
    sys.exit(7)
"""
)


@pytest.mark.parametrize(
    "program", [pytest.param(FORK_SERVICE, marks=pytest.mark.slow), FORK_ENGINE], ids=["service", "engine"]
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_fork_gets_errors_and_ends(tiny_bundle: Bundle, program: str) -> None:
    """A child lacks the threads that would answer. Without the errors it would wait for them, also at its exit."""
    ended = run(program, tiny_bundle.folder)
    assert (ended.returncode, ended.stderr) == (8, "")


def test_fork_by_multiprocessing(tiny_bundle: Bundle) -> None:
    program = """
import multiprocessing
context = multiprocessing.get_context("fork")
def child():
    try:
        service.generate([1])
    except ForkError:
        sys.exit(6)
process = context.Process(target=child)
process.start()
process.join()
assert process.exitcode == 6, process.exitcode
"""
    ended = run(SERVICE + program, tiny_bundle.folder)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_threads_of_others_keep_their_telemetry(tiny_bundle: Bundle) -> None:
    """ONNX Runtime sends telemetry from a thread, which keeps a forked child from ending. A variable turns it on."""
    program = (
        "import os; from medusa_runtime.backends.onnxruntime.session import import_onnxruntime; import_onnxruntime()"
    )
    assert run(program + "; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'", tiny_bundle.folder).returncode == 0
    kept = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; "
    assert (
        run(kept + program + "; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'", tiny_bundle.folder).returncode == 0
    )


def test_what_is_closed_at_exit_is_not_kept_alive(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_backend, "open_session", session.open_session)  # one that no other test keeps
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    engine.generate([1, 2, 3], max_new_tokens=3)
    gone = [weakref.ref(engine), weakref.ref(engine.backend), weakref.ref(engine.backend._session)]
    del engine
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_native_work_is_refused_once_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes_module, "_work", processes_module._NativeWork())
    monkeypatch.setattr(processes_module, "_open", weakref.WeakSet())
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with native_work():
            entered.set()
            assert leave.wait(30)

    worker, ending = threading.Thread(target=work), threading.Thread(target=processes_module._close_all)
    worker.start()
    assert entered.wait(30)
    ending.start()
    ending.join(0.1)
    assert ending.is_alive()  # it waits for the thread inside
    with pytest.raises(MedusaError, match="about to end"), native_work():
        pass
    leave.set()
    ending.join(30)
    assert not ending.is_alive()
    worker.join()


def test_the_error_names_both_processes() -> None:
    item = ProcessBound()
    item._process += 1
    assert item.in_forked_child
    assert str(os.getpid()) in str(item.fork_error) and str(item._process) in str(item.fork_error)


def test_killed_by_a_signal(tiny_bundle: Bundle) -> None:
    ended = run(SERVICE + "os.kill(os.getpid(), signal.SIGTERM)", tiny_bundle.folder)
    assert ended.returncode == -signal.SIGTERM
