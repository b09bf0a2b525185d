"""The two small C++ programs, compiled at first use, and the peers' own Python environment."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.in"


def cache_dir() -> Path:
    """Where compiled programs and the peers live between runs; remove it at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "blobflow" / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def compiled(name: str, *options: str) -> Path:
    """The program made from `server/<name>.cpp`, compiled anew if its source or the compiler's options changed.

    Raises:
        SystemExit: there is no C++ compiler, or it refuses.
    """
    source = HERE / "server" / f"{name}.cpp"
    made_from = hashlib.sha256(source.read_bytes() + " ".join(options).encode())
    program = cache_dir() / f"{name}-{made_from.hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("benchmarks: no C++ compiler. On Debian and Ubuntu: sudo apt-get install g++")
    made = program.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O2", "-std=c++17", "-pthread", "-o", str(made), str(source), *options]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"benchmarks: {source.name} does not compile")
    made.replace(program)
    return program


def peers_environment(*, install: bool) -> Path | None:
    """The directory of the virtual environment with the peers of requirements.in, or None if there is none.

    Args:
        install: Make it, or bring it up to date, if requirements.in is not what it was made from.
    """
    venv = cache_dir() / "peers"
    stamp = venv / "requirements.in"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.exists() and (not install or stamp.read_text(encoding="utf-8") == wanted):
        return venv
    if not install:
        return None
    print("benchmarks: installing the peers of benchmarks/requirements.in", file=sys.stderr)
    make_venv = HERE.parent / "tools" / "make-venv"
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq"]
    try:
        if not (venv / "bin" / "pip").exists():
            subprocess.run([str(make_venv), str(venv)], check=True)
        subprocess.run([*pip, "install", "--upgrade", "-r", str(REQUIREMENTS)], check=True)
    except subprocess.CalledProcessError as error:
        print(f"benchmarks: no peers from the package index ({error}); those on PATH are measured", file=sys.stderr)
        return None
    stamp.write_text(wanted, encoding="utf-8")
    return venv
