"""Where and with what a figure was measured: every result carries this."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.peers import PEERS

ROOT = Path(__file__).resolve().parent.parent


def facts() -> dict[str, str | int]:
    """Device, CPU, threads, versions, commit and command."""
    packages = {peer.package: peer.version() for peer in PEERS.values()}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {found}" for name, found in packages.items() if found),
        "commit": commit(),
        "command": os.environ.get("PEAR_BENCH_COMMAND") or "python " + " ".join(sys.orig_argv[1:]),
    }


def folder_name(facts: dict[str, str | int]) -> str:
    """Of bench/results/: the device and its threads, as a file name."""
    name = facts["device"] if facts["device"] != "cpu" else f"{facts['cpu']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\(.*?\)", "", str(name).lower())).strip("-")


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1) if found else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of HEAD, with `+` where the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
