"""Builds the compiled kernels. All other metadata is in pyproject.toml.

NCSN_FAST_BUILD=auto  the C++ kernels, and the CUDA kernels if nvcc is found and this torch could load them; without
                      torch, the pure-Python package
                cpu   the C++ kernels only
                cuda  both, or an error that names what is missing
                none  the pure-Python package (PyTorch reference and Triton kernels)

Also read: CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_THREADS, DEBUG, and NCSN_FAST_SANITIZE, the sanitizers
(such as address,undefined) of `make sanitize`. The operators use PyTorch's stable ABI: a build needs torch's headers,
no GPU and no CUDA build of torch, and serves every torch from MIN_TORCH on. The module around them uses Python's stable
ABI: a wheel serves every Python from the oldest on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()
MIN_TORCH = (2, 11)
MIN_PYTHON = "cp310"  # Py_LIMITED_API in csrc/binding.cpp is the same
# The architectures of a build that names none, as far as nvcc knows them; the newest also as PTX, for what comes after.
DEFAULT_CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
BUILD_COMMAND = "pip install --no-build-isolation ."
SANITIZE = os.environ.get("NCSN_FAST_SANITIZE", "")


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def quote(path: str | Path) -> str:
    return shlex.quote(str(path))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


# --- what is here ---------------------------------------------------------------------------------


def find_torch() -> tuple[Path, str, bool] | None:
    """Torch's folder and version, and whether it has CUDA, without the cost of importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    facts = (folder / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"](.+)['\"]", facts, re.M)
    return folder, version[1], re.search(r"^cuda\b.*= ['\"]", facts, re.M) is not None


def find_cuda_home() -> Path | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [Path(named)]
    else:
        nvcc = shutil.which("nvcc")
        candidates = [Path(nvcc).resolve().parent.parent] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))  # nvcc on the path may be a wrapper elsewhere
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    return next((c for c in candidates if all((c / file).is_file() for file in needed)), None)


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None
    )
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise SetupError(
            f"no C++ compiler ({compiler or 'c++, g++ or clang++'} was not found): install one, set CXX, "
            "or build the pure-Python package with NCSN_FAST_BUILD=none"
        )
    return compiler


def gpus_there() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as 9.0, in order; none without a driver."""
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(re.findall(r"^\d+\.\d+$", told.stdout, re.M)), key=numbers)


def cuda_architectures(nvcc: Path) -> list[str]:
    """The ``-gencode`` flags for TORCH_CUDA_ARCH_LIST, for the GPUs that are there, or for the defaults.

    Of the last two, those that this nvcc knows.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
        known_of = lambda archs: [a for a in archs if f"compute_{a.replace('.', '')}" in known]  # noqa: E731
        listed = known_of(gpus_there()) or known_of(DEFAULT_CUDA_ARCHS)
        listed[-1] += "+PTX"
    flags = []
    for arch in listed:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, got {arch!r}"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# --- what to build --------------------------------------------------------------------------------


def plan() -> list[Extension]:
    """The extensions that NCSN_FAST_BUILD asks for and this machine can build."""
    mode = os.environ.get("NCSN_FAST_BUILD") or "auto"
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SetupError(f"NCSN_FAST_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    if mode == "none":
        return []
    problem = None
    torch = find_torch()
    if torch is None:
        problem = (
            f"torch is not in the build environment; with torch installed, run: {BUILD_COMMAND}"
        )
    elif numbers(torch[1]) < MIN_TORCH:
        problem = f"torch >= {'.'.join(map(str, MIN_TORCH))} is needed, found {torch[1]}"
    elif sys.platform == "win32":
        problem = "the kernels do not build on Windows"
    elif sysconfig.get_config_var("Py_GIL_DISABLED"):
        problem = "the kernels do not build for a free-threaded Python, which has no stable ABI"
    if problem is not None:
        if mode != "auto":
            raise SetupError(f"NCSN_FAST_BUILD={mode}: {problem}")
        print(f"ncsn_fast: building without C++ and CUDA kernels: {problem}", file=sys.stderr)
        return []

    def sources(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for g in patterns for p in ROOT.glob(g))

    headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
    extensions = [
        Extension(
            "ncsn_fast._C",
            sources("csrc/binding.cpp", "csrc/cpu/**/*.cpp"),
            depends=headers,
            py_limited_api=True,
        )
    ]
    if mode == "cuda" and find_cuda_home() is None:
        raise SetupError(
            "NCSN_FAST_BUILD=cuda: no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found; "
            "install it or set CUDA_HOME"
        )
    if mode == "auto" and find_cuda_home() is not None and not torch[2]:
        print(
            f"ncsn_fast: building without CUDA kernels, which torch {torch[1]} could not load "
            "(NCSN_FAST_BUILD=cuda builds them all the same)",
            file=sys.stderr,
        )
    elif mode != "cpu" and find_cuda_home() is not None:
        extensions.append(
            Extension(
                "ncsn_fast._C_cuda",
                sources("csrc/cuda/**/*.cu"),
                depends=headers,
                py_limited_api=True,
            )
        )
    return extensions


# --- how to build it ------------------------------------------------------------------------------


class BuildKernels(build_ext):
    """Builds each extension with ninja, in a folder that outlives the build, so that a second one is quick."""

    def run(self) -> None:
        # What an earlier build with another NCSN_FAST_BUILD left would be loaded, or packed into the wheel.
        planned = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        here = [ROOT] if self.inplace or self.editable_mode else []
        for folder in (Path(self.build_lib), *here):
            for library in (folder / "ncsn_fast").glob("_C*.so"):
                if library.name not in planned:
                    library.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import ninja
        from ninja import ninja_syntax

        torch_dir, torch_version, _ = find_torch()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch_version}"
        if SANITIZE:
            tag += "-sanitize"
        folder = ROOT / "build" / f"kernels-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{ext.name}.so"
        cuda = ext.name.endswith("_cuda")
        tools = cuda_toolchain(torch_dir) if cuda else cpp_toolchain(torch_dir)
        if not cuda:
            write_if_changed(folder / "build_config.h", self.build_config(tools, torch_version))
            tools["flags"].append(f"-I{quote(folder)}")

        manifest = folder / f"{ext.name}.ninja"
        with manifest.open("w") as file:
            out = ninja_syntax.Writer(file, width=10_000)
            out.variable("builddir", str(folder))
            out.rule(
                "compile",
                [tools["compiler"], *tools["flags"], "-MMD -MF $out.d -c $in -o $out"],
                depfile="$out.d",
                deps="gcc",
                description=f"compile $in ({ext.name})",
            )
            link = [tools["linker"], "$in -o $out", *tools["libraries"]]
            out.rule("link", link, description="link $out")
            objects = [f"{folder / s}.o" for s in ext.sources]  # ninja makes their folders
            for source, target in zip(ext.sources, objects, strict=True):
                out.build(target, "compile", str(ROOT / source))
            out.build(str(library), "link", objects)

        jobs = os.environ.get("MAX_JOBS")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(manifest)]
        command += ["-j", jobs] if jobs else []
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SetupError(f"building {ext.name} failed; the compiler's message is above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)

    def build_config(self, tools: dict, torch_version: str) -> str:
        """The header of facts that ``ncsn_fast._C.build_config()`` returns."""
        cuda = [e for e in self.extensions if e.name.endswith("_cuda")]
        version, architectures = "", ""
        if cuda:
            nvcc = find_cuda_home() / "bin" / "nvcc"
            release = subprocess.check_output([nvcc, "--version"], text=True)
            version = re.search(r"release ([\d.]+)", release)[1]
            architectures = " ".join(re.findall(r"code=(\w+)", " ".join(cuda_architectures(nvcc))))
        facts = {
            "COMPILER_FLAGS": " ".join(
                f for f in tools["flags"] if f[:2] not in ("-I", "-i") and "-map=" not in f
            ),
            "TORCH_VERSION": torch_version,
            "CUDA_VERSION": version,
            "CUDA_ARCHITECTURES": architectures,
            "SCHEMAS": schemas_fingerprint(),
        }
        lines = [f'#define NCSN_{name} R"({value})"' for name, value in facts.items()]
        return "// Written by setup.py.\n" + "\n".join(lines) + "\n"


def schemas_fingerprint() -> str:
    """``ncsn_fast.ops.schema.fingerprint()`` of the sources: kernels of other schemas are refused when they load."""
    tree = ast.parse((ROOT / "ncsn_fast" / "ops" / "schema.py").read_text(encoding="utf-8"))
    schemas = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEMAS"
    )
    return hashlib.sha256(repr(sorted(schemas.items())).encode()).hexdigest()[:16]


def common_flags(torch_dir: Path) -> list[str]:
    include = torch_dir / "include"
    major, minor = MIN_TORCH
    return [
        "-std=c++17",
        "-g -O0" if flag("DEBUG") else "-O3 -DNDEBUG",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ull",
        f"-I{quote(ROOT / 'csrc')}",
        f"-isystem {quote(include)}",
    ]


def anonymous_paths(torch_dir: Path) -> list[str]:
    """Keeps the folders of the building machine out of the messages of the kernels' checks."""
    folders = (torch_dir / "include", ROOT)
    return [f"-ffile-prefix-map={quote(f'{folder}/')}=" for folder in folders]


def cpp_toolchain(torch_dir: Path) -> dict:
    compiler = find_compiler()
    # No contraction to fused multiply-adds and no -ffast-math: the noise has the same bits on every SIMD level.
    # No -march=native: the level is chosen at run time.
    flags = [
        "-fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra",
        *anonymous_paths(torch_dir),
        f"-isystem {quote(sysconfig.get_paths()['include'])}",
        *common_flags(torch_dir),
    ]
    if SANITIZE:
        # After -O3, which would take minutes to compile and tell no more.
        flags.append(
            f"-O1 -g -fsanitize={SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all"
        )
        compiler += f" -fsanitize={SANITIZE}"  # and links with their libraries
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    return {
        "compiler": compiler,
        "flags": flags,
        "linker": f"{compiler} {shared}",
        "libraries": [f"-L{quote(torch_dir / 'lib')}", "-ltorch_cpu"],
    }


def cuda_toolchain(torch_dir: Path) -> dict:
    home = find_cuda_home()
    nvcc = home / "bin" / "nvcc"
    flags = [
        *common_flags(torch_dir),
        *cuda_architectures(nvcc),
        f"-ccbin {quote(find_compiler())}",
        "-DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden",
        # nvcc hands a flag with a space on as two.
        *(f"-Xcompiler {f}" for f in anonymous_paths(torch_dir) if not re.search(r"[\s,]", f)),
        f"--threads {os.environ.get('NVCC_THREADS') or '1'}",
    ]
    library_dir = next(d for d in (home / "lib64", home / "lib") if d.is_dir())
    return {
        "compiler": quote(nvcc),
        "flags": flags,
        "linker": f"{find_compiler()} -shared",
        # The one symbol of libtorch_cuda.so (the current stream) is left open: it resolves through libtorch.so, which
        # needs libtorch_cuda.so in a CUDA build of torch. So this links with a CPU build of torch too.
        "libraries": [
            f"-L{quote(torch_dir / 'lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu",
            f"-L{quote(library_dir)} -lcudart_static -ldl -lrt -lpthread",
        ],
    }


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


extensions = plan()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": MIN_PYTHON}} if extensions else {},
)
