"""Where and with what a figure was measured: every result carries this."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.peers import PEERS

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = 1  # of measuring: one more where figures of before no longer compare
SAME = ("device", "driver", "cpu", "threads", "python", "versions", "source", "protocol")  # else nothing is resumed


def facts(device: str) -> dict[str, str | int]:
    """Device, driver, CPU, threads, versions, commit and command."""
    found = {"device": torch.cuda.get_device_name(), "driver": driver()} if device == "cuda" else {"device": device}
    return {
        **found,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "source": source(),
        "protocol": PROTOCOL,
        "command": os.environ.get("PEAR_BENCH_COMMAND") or "python " + " ".join(sys.orig_argv[1:]),
    }


def stamp(facts: dict[str, str | int]) -> str:
    """Ten hex digits of everything that a figure depends on; figures of one stamp belong together."""
    return digest(repr([facts.get(name) for name in SAME]).encode())


def folder_name(facts: dict[str, str | int]) -> str:
    """Of bench/results/: the device (for a CPU its threads too), as a file name."""
    name = facts["device"]
    if name in ("cpu", "tiny"):
        name = f"{'tiny ' if name == 'tiny' else ''}{facts['cpu']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\(.*?\)", "", str(name).lower())).strip("-")


def versions() -> str:
    packages = dict.fromkeys(["torch", "triton", *(peer.package for peer in PEERS.values())])
    of = {"triton": installed("triton"), **{peer.package: peer.version() for peer in PEERS.values()}}
    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""
    return ", ".join(f"{name} {of[name]}{cuda * (name == 'torch')}" for name in packages if of[name])


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1) if found else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def driver() -> str:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown"


def commit() -> str:
    """Short hash of HEAD, with `+` where the tree differs from it; $PEAR_BENCH_COMMIT where there is no git."""
    head = output("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return os.environ.get("PEAR_BENCH_COMMIT") or "unknown"
    return head + ("+" if output("git", "status", "--porcelain", "-uno") else "")


def source() -> str:
    """Digest of pear_kernels as it stands, which a commit's hash is not where there is no git or the tree differs."""
    files = sorted((ROOT / "pear_kernels").rglob("*.py"))
    return digest(*(part for path in files for part in (str(path.relative_to(ROOT)).encode(), path.read_bytes())))


def digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:10]


def output(*command: str) -> str:
    """What a command prints, or "" where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
