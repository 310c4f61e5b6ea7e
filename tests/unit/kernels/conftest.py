"""Kernels run in Triton's interpreter here; it must be chosen before triton is imported by anything."""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
