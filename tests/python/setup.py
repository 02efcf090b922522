#!/usr/bin/env python3
"""Make the Python environment with the reference implementations, and print its interpreter's path.

    python3 tests/python/setup.py

The environment lies in $XDG_CACHE_HOME/lathe/venv (~/.cache/lathe/venv) and is kept until requirements.txt or
this file changes. Needs a C compiler and readelf (binutils).

torch's published Linux wheel (540 MB) is linked against CUDA and asks for 2 GB more of CUDA wheels, none of which
a CPU test runs. Here torch is installed without them, and each CUDA library is a stub of a few kilobytes whose
functions answer "no device" (100, cudaErrorNoDevice).
"""

import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
# CUDA libraries that version their symbols name themselves there; these do not.
UNVERSIONED = {"nccl": "libnccl.so.2", "cusparseLt": "libcusparseLt.so.0", "cuFile": "libcufile.so.0"}
NVSHMEM = "libnvshmem_host.so.3"
TORCH_LIBRARIES = ["torch_cuda", "torch_cpu", "torch_python", "c10_cuda", "torch_nvshmem", "torch_global_deps"]


def main() -> None:
    venv = cache_home() / "lathe" / "venv"
    python = venv / "bin" / "python"
    stamp = venv / "lathe-stamp"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + pathlib.Path(__file__).read_bytes()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == wanted):
        if not python.exists():
            run(sys.executable, "-m", "venv", venv)
        install(python)
        site = pathlib.Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        write_cuda_stubs(site)
        run(python, "-c", "import torch, transformers, peft, sacrebleu, rouge_score, openai; assert torch.ones(2).sum() == 2")
        stamp.write_text(wanted)
    print(python)


def cache_home() -> pathlib.Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    return pathlib.Path(configured) if configured.startswith("/") else pathlib.Path.home() / ".cache"


def install(python: pathlib.Path) -> None:
    """torch, peft and accelerate (which would pull torch's dependencies) alone, then everything else."""
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    alone = [line for line in lines if re.match(r"(torch|peft|accelerate)==", line)]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    run(*pip, "--no-deps", *alone)
    run(*pip, *[line for line in lines if line not in alone])


def write_cuda_stubs(site: pathlib.Path) -> None:
    """Compile one stub for each CUDA library that torch's libraries name, where their RPATH looks for it."""
    lib = site / "torch" / "lib"
    libraries = [lib / f"lib{name}.so" for name in TORCH_LIBRARIES if (lib / f"lib{name}.so").exists()]
    needed = output("readelf", "-W", "-d", *libraries)
    sonames = {name for name in re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]*)\]", needed)}
    major = {re.search(r"libcudart\.so\.(\d+)", name).group(1) for name in sonames if "cudart" in name}.pop()
    symbols: dict[str, set[tuple[str, str]]] = {name: set() for name in sonames}
    for line in output("readelf", "-W", "--dyn-syms", *libraries).splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[6] != "UND":
            continue
        name, _, version = fields[7].partition("@")
        version = version.lstrip("@")
        if version in sonames:
            symbols[version].add((name, version))
        elif version == "NVSHMEM":
            symbols[NVSHMEM].add((name, version))
        elif not version:
            for prefix, soname in UNVERSIONED.items():
                if name.startswith(prefix) and soname in sonames:
                    symbols[soname].add((name, ""))
    target = site / "nvidia" / f"cu{major}" / "lib"
    target.mkdir(parents=True, exist_ok=True)
    for soname, wanted in symbols.items():
        compile_stub(target / soname, soname, wanted)


def compile_stub(path: pathlib.Path, soname: str, symbols: set[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, script = pathlib.Path(scratch) / "stub.c", pathlib.Path(scratch) / "stub.map"
        code = []
        for name, _ in sorted(symbols):
            text = name.endswith(("GetErrorString", "GetErrorName", "GetLastErrorString"))
            code.append(f'const char *{name}(void) {{ return "CUDA stub"; }}' if text else f"long {name}(void) {{ return 100; }}")
        source.write_text("\n".join(code) + "\n")
        command = ["cc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", path, source]
        versions = {version for _, version in symbols if version}
        if versions:
            body = "".join(f"{version} {{ global: *; }};\n" for version in versions)
            script.write_text(body)
            command.insert(1, f"-Wl,--version-script={script}")
        run(*command)


def run(*command) -> None:
    """Run quietly: pip calls torch's absent CUDA wheels an error on every call. What failed is printed whole."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nfailed ({done.returncode}): {' '.join(str(part) for part in command)}")


def output(*command) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
