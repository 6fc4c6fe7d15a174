"""`make sanitize`: one small case of every kernel under each tool of compute-sanitizer. Needs an NVIDIA GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = "tests/ops/test_every_op_memory.py"
CASES = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "sanitize", TESTS]
# A cache would hand out memory whose borders the tools cannot see.
ENVIRONMENT = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitize: not run: PyTorch sees no CUDA device")
        return 1
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        print("sanitize: not run: no compute-sanitizer on the path; it comes with the CUDA toolkit")
        return 1
    failed = []
    for tool in TOOLS:
        print(f"== {tool}", flush=True)
        options = [f"--tool={tool}", "--error-exitcode=86", "--target-processes=all"]
        if subprocess.run([sanitizer, *options, *CASES], env=ENVIRONMENT, check=False).returncode != 0:
            failed.append(tool)
    print(f"sanitize: {', '.join(failed)} found errors" if failed else "sanitize: no errors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
