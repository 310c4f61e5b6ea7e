"""Kernels run in Triton's interpreter here; it must be chosen before triton is imported by anything.

Where it cannot be (a GPU's tests run in the same process, or triton was imported already), these tests are
skipped, and `test_own_process.py` runs them in a process of their own.
"""

import os
import sys

import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
