"""A bridge from setuptools to CMake: CMakeLists.txt describes the build. Settings are in pyproject.toml.

Environment: NORMATCH_CUDA=auto|0|1 (auto: the CUDA kernels are built where nvcc is found),
CMAKE_CUDA_ARCHITECTURES (default "80-real;90-real;100-real;120").
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("NORMATCH_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"NORMATCH_CUDA is {cuda!r}, but may be auto, 0 or 1")
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise SystemExit("building normatch's extension needs torch (2.11 or later) in the same environment")
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch.submodule_search_locations[0]}",
            f"-DNORMATCH_OUTPUT={output}",
            f"-DNORMATCH_CUDA={cuda}",
        ]  # fmt: skip
        # In an isolated build the compile tools are on PATH; beside a virtual environment's python they may not be.
        env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        for command in (configure, ["cmake", "--build", str(build)]):
            if status := subprocess.run(command, env=env).returncode:
                raise SystemExit(f"normatch: `{' '.join(command[:3])} ...` failed with status {status}, see above")


def compiler() -> str | None:
    """The C++ compiler CMake would use, if there is one."""
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


extensions = [Extension("normatch._C", sources=[])]
if compiler() is None and os.environ.get("NORMATCH_CUDA") != "1":
    print("normatch: no C++ compiler found; installing without the compiled ops (plain PyTorch is used)",
          file=sys.stderr)  # fmt: skip
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
