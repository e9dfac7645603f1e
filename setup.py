"""What pyproject.toml cannot say: which folders are which packages, and how the native extension is built.

The environment may say more:
    FASTGPT_BUILD          cpu, cuda (an error where CUDA cannot be built) or none; otherwise what is possible
    TORCH_CUDA_ARCH_LIST   GPUs to build for, such as "8.0;9.0a+PTX"; otherwise those present, else TARGETS
    CUDA_HOME              the CUDA toolkit; otherwise that of the nvcc on PATH
    MAX_JOBS               compilers at once; otherwise what cores and memory allow
    CXX                    the C++ compiler
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

TARGETS = "8.0;9.0a;10.0a;12.0+PTX"  # A100, H100, B200, RTX 50; PTX for what comes after
CHOICES = ("cpu", "cuda", "none")
GIGABYTES_A_JOB = 3  # a file that includes all of PyTorch's headers
ROOT = Path(__file__).parent


def wanted() -> str:
    """FASTGPT_BUILD, checked; '' leaves the choice to what the machine has."""
    choice = os.environ.get("FASTGPT_BUILD", "")
    if choice and choice not in CHOICES:
        sys.exit(f"FASTGPT_BUILD={choice!r}: it must be one of {', '.join(CHOICES)}")
    return choice


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def cuda_home() -> Path | None:
    """The toolkit's root. The nvcc on PATH may be a script that calls another one, and says where that is."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ _?TOP=(.*)$", dry.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def cuda_mismatch(home: Path) -> str | None:
    """Why the toolkit cannot compile for this PyTorch, in one line, or None when it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build of it"
    version = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None:
        return f"{home}/bin/nvcc does not run: set CUDA_HOME to the root of a CUDA toolkit"
    if found[1] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is {found[1]}.{found[2]} and torch {torch.__version__} is for CUDA {torch.version.cuda}: "
            f"they must agree in the major version"
        )
    return None


def jobs() -> int:
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(gigabytes // GIGABYTES_A_JOB)))


def use_cuda(choice: str) -> bool:
    """Whether to build for CUDA, having set CUDA_HOME for PyTorch's build tools."""
    if choice == "cpu":
        return False
    home = cuda_home()
    problem = "no nvcc: install the CUDA toolkit, or set CUDA_HOME" if home is None else cuda_mismatch(home)
    if problem:
        if choice == "cuda":
            sys.exit(f"FASTGPT_BUILD=cuda: {problem}")
        print(f"fastgpt: building for the CPU alone: {problem}", file=sys.stderr)
        return False
    os.environ["CUDA_HOME"] = str(home)
    return True


def cuda_options(flags: list[str]) -> dict[str, Any]:
    """Options for compiling CUDA and linking cuBLASLt, of the wheels that PyTorch needs or of the toolkit."""
    import torch

    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = TARGETS
    home = Path(os.environ["CUDA_HOME"])
    includes, libraries, link = [home / "include"], [home / "lib64"], "-lcublasLt"
    major = torch.version.cuda.split(".")[0]
    wheel = Path(torch.__file__).parents[1] / "nvidia" / f"cu{major}"
    if (wheel / "include/cublasLt.h").exists():  # which holds only libraries with versions in their names
        libraries, link = [wheel / "lib"], f"-l:libcublasLt.so.{major}"
        includes.append(wheel / "include")  # after those that nvcc belongs to
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST", "those present")
    return {
        "include_dirs": [str(path) for path in includes],
        "library_dirs": [str(path) for path in libraries],
        "define_macros": [("FASTGPT_CUDA", f'"{targets}"')],
        "extra_link_args": [link, "-Wl,-rpath,$ORIGIN/../nvidia/cu" + major + "/lib"],
        "extra_compile_args": {
            "cxx": flags,
            "nvcc": ["-O3", "-std=c++17", "--threads=2", "-Xptxas=-warn-spills"],
        },
    }


def extension() -> dict[str, Any]:
    """`ext_modules` and `cmdclass`, empty where nothing is to be built."""
    choice = wanted()
    if choice == "none":
        return {}
    if compiler() is None:
        if choice:
            sys.exit(f"FASTGPT_BUILD={choice}: no C++ compiler: install g++ or clang++, or set CXX")
        print("fastgpt: no C++ compiler: installing without the native kernels", file=sys.stderr)
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit("fastgpt builds against an installed PyTorch: pip install torch, or set FASTGPT_BUILD=none")

    os.environ.setdefault("MAX_JOBS", str(jobs()))
    csrc = Path("csrc")
    sources = [*csrc.glob("*.cpp"), *csrc.glob("autograd/*.cpp"), *csrc.glob("cpu/*.cpp")]
    flags = [
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-psabi",
    ]
    flags += ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
    options: dict[str, Any] = {"extra_compile_args": {"cxx": flags}}
    make = cpp_extension.CppExtension
    if use_cuda(choice):
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # which it looked up when it was imported
        make = cpp_extension.CUDAExtension
        sources += [*csrc.glob("cuda/*.cpp"), *csrc.glob("cuda/*.cu")]
        options = cuda_options(flags)
    options["include_dirs"] = [str(ROOT / csrc), *options.get("include_dirs", [])]
    native = make("fastgpt._C", sorted(map(str, sources)), **options)
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
    }


setup(
    packages=[
        *find_packages(include=["fastgpt", "fastgpt.*"]),
        *("fastgpt.kernels", "fastgpt.benchmarks", "fastgpt.benchmarks.report", "fastgpt.benchmarks.studies"),
    ],
    # The Triton kernels and the benchmarks are top-level folders here, for readers; installed, they belong to
    # the package: a top-level `kernels` in site-packages would collide with the PyPI package of that name.
    package_dir={"fastgpt.kernels": "kernels", "fastgpt.benchmarks": "benchmarks"},
    package_data={
        "fastgpt": ["py.typed", "chips.yaml", "ops/measured.json"],
        "fastgpt.benchmarks.report": ["*.html", "*.css", "*.js"],
    },
    **extension(),
)
