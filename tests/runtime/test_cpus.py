"""The number of CPUs that a process may use: affinity, control groups and OMP_NUM_THREADS, in made-up folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.cli import main
from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.common.cpus import cpu_quota, limit_openmp_threads, usable_cpus

V2 = "41 31 0:38 {root} {point} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture(autouse=True)
def _many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def system(folder: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A folder that looks like a machine's root to the process."""
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(mounts), **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("text", "quota", "cpus"),
    [
        ("max 100000", None, 64),
        ("max", None, 64),
        ("100000 100000", 1, 1),
        ("150000 100000", 1.5, 1),
        ("399999 100000", 3.99999, 3),
        ("20000 100000", 0.2, 1),
        ("800000 200000", 4, 4),
        ("200000", 2, 2),
        ("12800000 100000", 128, 64),
        ("0 100000", None, 64),
        ("100000 0", None, 64),
        ("rubbish 100000", None, 64),
        ("", None, 64),
    ],
)
def test_a_container_of_cgroup_v2(tmp_path: Path, text: str, quota: float | None, cpus: int) -> None:
    mount = V2.format(root="/", point="/sys/fs/cgroup")
    root = system(tmp_path, "0::/", [mount], {"sys/fs/cgroup/cpu.max": text})
    assert cpu_quota(root) == quota
    assert usable_cpus(root, {}) == cpus


@pytest.mark.parametrize("limited", ["", "kubepods.slice", "kubepods.slice/pod one", "kubepods.slice/pod one/it"])
def test_a_limit_above_counts(tmp_path: Path, limited: str) -> None:
    """Often the group itself has no limit, and its parent has the quota."""
    top = "sys/fs/cgroup/unified"
    files = {f"{top}/{part}/cpu.max": "max 100000" for part in ("kubepods.slice", "kubepods.slice/pod one/it")}
    files[f"{top}/kubepods.slice/other/cpu.max"] = "100000 100000"  # the limit of another group
    files[f"{top}/{limited}/cpu.max"] = "300000 100000"
    mount = V2.format(root="/", point="/sys/fs/cgroup/unified")
    root = system(tmp_path, "1:cpu:/else\n0::/kubepods.slice/pod one/it", [mount], files)
    assert usable_cpus(root, {}) == 3


def test_the_least_of_all_limits(tmp_path: Path) -> None:
    files = {"cg/a/cpu.max": "800000 100000", "cg/a/b/cpu.max": "500000 100000", "cg/cpu.max": "700000 100000"}
    root = system(tmp_path, "0::/a/b", [V2.format(root="/", point="/cg")], files)
    assert usable_cpus(root, {}) == 5
    assert usable_cpus(root, {"OMP_NUM_THREADS": "2"}) == 2
    assert usable_cpus(root, {"OMP_NUM_THREADS": "40"}) == 5


@pytest.mark.parametrize(
    ("path", "mounted", "folder"),
    [
        ("/docker/abc", "/docker/abc", ""),  # without an own namespace the mount shows the group itself
        ("/docker/abc/inner", "/docker/abc", "inner"),
        ("/", "/", ""),
        ("/../other", "/", ""),  # outside the mounted part
        ("/docker/abc", "/docker/xyz", ""),
        ("/docker/abc", "/docker/ab", ""),
    ],
)
def test_a_container_of_cgroup_v1(tmp_path: Path, path: str, mounted: str, folder: str) -> None:
    files = {
        f"sys/fs/cgroup/cpu,cpuacct/{folder}/cpu.cfs_quota_us": "250000",
        f"sys/fs/cgroup/cpu,cpuacct/{folder}/cpu.cfs_period_us": "100000",
    }
    mounts = ["22 1 8:1 / / rw - ext4 /dev/root rw", V1.format(root=mounted, point="/sys/fs/cgroup/cpu,cpuacct")]
    root = system(tmp_path, f"4:memory:/x\n3:cpu,cpuacct:{path}\n0::/", mounts, files)
    assert cpu_quota(root) == 2.5
    assert usable_cpus(root, {}) == 2


def test_no_limit_in_cgroup_v1(tmp_path: Path) -> None:
    files = {"cg/cpu.cfs_quota_us": "-1", "cg/cpu.cfs_period_us": "100000"}
    root = system(tmp_path, "3:cpu,cpuacct:/", [V1.format(root="/", point="/cg")], files)
    assert cpu_quota(root) is None


def test_mount_points_with_spaces(tmp_path: Path) -> None:
    mount = V2.format(root="/", point=r"/my\040groups")
    root = system(tmp_path, "0::/", [mount], {"my groups/cpu.max": "200000 100000"})
    assert usable_cpus(root, {}) == 2


@pytest.mark.parametrize(
    ("value", "cpus"),
    [("3", 3), ("4,2", 4), (" 5 , 1", 5), ("007", 7), ("0", 64), ("-1", 64), ("many", 64), ("", 64), ("2.5", 64),
     (",2", 64), ("9" * 5000, 64), ("²", 64), ("1000", 64)],
)  # fmt: skip
def test_openmp_threads(tmp_path: Path, value: str, cpus: int) -> None:
    assert usable_cpus(tmp_path, {"OMP_NUM_THREADS": value}) == cpus


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_rubbish_is_no_limit(tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str, openmp: str) -> None:
    """With any content of these files the process gets a number of CPUs."""
    folder = tmp_path_factory.mktemp("rubbish")
    files = {"proc/self/cgroup": "0::/\n" + a, "cg/cpu.max": c}
    files["proc/self/mountinfo"] = V2.format(root="/", point="/cg") + "\n" + b
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    assert 1 <= usable_cpus(folder, {"OMP_NUM_THREADS": openmp}) <= 64


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have neither affinity nor control groups."""
    assert usable_cpus(tmp_path, {}) == 64
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus(tmp_path, {}) == os.cpu_count()


def test_a_backend_takes_as_many_threads(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert OnnxRuntimeBackend(tiny_bundle).name.endswith("CPU, 1 threads")


def test_what_others_start_threads_by(tmp_path: Path) -> None:
    """PyTorch knows affinity masks but no quotas, so a command sets its number of threads."""
    root = system(tmp_path, "0::/", [V2.format(root="/", point="/cg")], {"cg/cpu.max": "300000 100000"})
    environment: dict[str, str] = {}
    limit_openmp_threads(environment, root)
    assert environment == {"OMP_NUM_THREADS": "3"}
    environment = {"OMP_NUM_THREADS": "7"}
    limit_openmp_threads(environment, root)
    assert environment == {"OMP_NUM_THREADS": "7"}
    (root / "cg/cpu.max").write_text("max 100000")
    environment = {}
    limit_openmp_threads(environment, root)
    assert environment == {}


def test_every_command_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("medusa_export.cli.limit_openmp_threads", told.append)
    CliRunner().invoke(main, ["inspect", "nowhere"])
    assert told == [os.environ]
