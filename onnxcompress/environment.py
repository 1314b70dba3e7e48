"""Facts of the machine that a measured time is worth nothing without."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "cpu_flags",
    "cpu_quota",
    "describe_environment",
    "environment_warnings",
    "frequency_governor",
    "gpu_memory_used",
    "gpus",
    "has_int8_dot_product",
    "saturation_note",
]

#: instruction sets that matter to float32 and int8 kernels, as Linux spells them
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)

_PACKAGES = (
    "onnxcompress",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "onnx-graphsurgeon",
    "numpy",
    "openvino",
    "torch",
)


def describe_environment() -> dict[str, Any]:
    """The machine and the versions, ready for JSON: nothing in it names the host or its user.

    Keys: date (UTC), platform, python, versions (of packages that are installed), cpu, instruction_sets, int8 (True
    where the CPU multiplies bytes without saturating, None where that is not known), cores, usable_cores,
    cpu_quota (in cores, None: no limit), governor (of the clock frequency, None: not known), virtual (True in a virtual
    machine), memory_bytes, gpus, load_1min.
    """
    flags = cpu_flags()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": package_versions(),
        "cpu": _cpu_name(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "int8": has_int8_dot_product(flags),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "cpu_quota": cpu_quota(),
        "governor": frequency_governor(),
        "virtual": "hypervisor" in flags if flags else None,
        "memory_bytes": _memory(),
        "gpus": gpus(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def processor() -> dict[str, Any]:
    """What measured times and sums in floating point depend on: the processor, its instruction sets and cores."""
    flags = cpu_flags()
    return {
        "cpu": _cpu_name(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "cores": [os.cpu_count(), _usable_cores()],
        "python": platform.python_version(),
    }


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The CPU's feature flags as Linux lists them; empty where there is no such list."""
    for key in ("flags", "Features"):  # x86, ARM
        value = _cpuinfo(cpuinfo, key)
        if value:
            return frozenset(value.split())
    return frozenset()


def has_int8_dot_product(flags: frozenset[str]) -> bool | None:
    """True where the CPU sums products of bytes in 32 bits (VNNI, AMX, ARM dot product); None for unknown flags.

    Without it x86 sums pairs of products in 16 bits, which saturates.
    """
    if not flags:
        return None
    return bool(flags & {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})


def saturation_note() -> str:
    """What whoever quantises weights to 8 bits for x86 has to know, and whether it concerns this machine."""
    here = {True: "this one has it", False: "this one does not", None: "this one is not known"}
    return (
        "on x86 processors without VNNI or AMX int8 weights saturate and accuracy drops "
        f"({here[has_int8_dot_product(cpu_flags())]}); there, use --target x86-any, or set "
        "session.x64quantprecision=1 in onnxruntime"
    )


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the control group may use at once; None where it is not limited or not known."""
    try:
        unified = root / "cpu.max"
        if unified.exists():
            quota, period = unified.read_text().split()[:2]
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        if quota == "max" or int(quota) <= 0:
            return None
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def frequency_governor(root: Path = Path("/sys/devices/system/cpu")) -> str | None:
    """What Linux chooses the clock frequency by, where it does; several are joined by commas."""
    found = set()
    for file in root.glob("cpu[0-9]*/cpufreq/scaling_governor"):
        with suppress(OSError):
            found.add(file.read_text().strip())
    return ", ".join(sorted(found)) or None


def gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs as their driver tells: index, name, driver, memory_mib; none without the driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",") == 3]
        return [
            {"index": int(index), "name": name, "driver": driver, "memory_mib": int(memory)}
            for index, name, driver, memory in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def gpu_memory_used(index: int) -> int | None:
    """Bytes of the memory of GPU ``index`` that are in use, by whomever; None where the driver does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(answer.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def environment_warnings(environment: Mapping[str, Any], *, threads: int, integer: bool) -> list[str]:
    """What in ``environment`` spoils times taken there.

    Args:
        environment: what :func:`describe_environment` gives.
        threads: threads of a model; 0: as many as there are cores.
        integer: an 8-bit model is among those that are timed.
    """
    warnings = []
    cores = environment.get("usable_cores") or 1
    wanted = threads or cores
    load, quota = environment.get("load_1min"), environment.get("cpu_quota")
    governor = environment.get("governor")
    if load is not None and load > 0.5 * cores:
        warnings.append(f"the load was {load:g} on {cores} cores when the run began: others use this machine too")
    if wanted > cores:
        warnings.append(f"{wanted} threads on {cores} cores wait for each other")
    if quota is not None and wanted > quota:
        warnings.append(
            f"{wanted} threads may use {quota:g} cores at once only, and are stopped for a while above that"
        )
    if governor is not None and governor != "performance":
        warnings.append(f"the clock follows the load (governor {governor}); set it to performance for steady times")
    if integer and environment.get("int8") is False:
        warnings.append(
            "this processor has no VNNI or AMX: 8-bit models are slower here than on one that has, and may saturate"
        )
    return warnings


def _memory() -> int | None:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_name() -> str:
    return _cpuinfo(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _cpuinfo(path: Path, key: str) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def package_versions() -> dict[str, str]:
    """Versions of what results depend on, of packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
