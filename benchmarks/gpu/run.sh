#!/bin/sh
# The first minutes on a GPU: see benchmarks/gpu/run.py. PYTHON names the interpreter that has flowroll installed.
cd "$(dirname "$0")/../.." || exit 1
exec "${PYTHON:-python}" -m benchmarks.gpu.run "$@"
