#!/bin/sh
# Everything that needs a CUDA device, in the order in which a fault is easiest to understand: kernels, then
# models in float32, then half precision and options. Kernels' tests mostly compile, so they run side by side.
# Usage: tests/gpu/run.sh [FOLDER for what is told besides]
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}services:shared:kernels" PAGEBUS_GPU_REPORT="${1:-.}/agreement.txt"
at_once() { python3 -c 'import xdist' 2>/dev/null && echo "-n $1" || true; }
status=0
python3 -m pytest -m gpu $(at_once 12) tests/gpu/test_kernels_gpu.py || status=1
python3 -m pytest -m gpu $(at_once 6) tests/gpu/test_model_runner_gpu.py tests/gpu/test_device_runner_gpu.py || status=1
python3 -m pytest -m gpu tests/gpu/test_model_options_gpu.py || status=1
exit $status
