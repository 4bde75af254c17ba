#!/usr/bin/env bash
# benchmarks/gpu.py on a GPU machine that reaches no package index and lacks some packages. From the repository's root:
#
#   bash benchmarks/gpu_check.sh wheels      here: fetch what that machine's image lacks into .whl, which is to be carried along
#   bash benchmarks/gpu_check.sh run         there: the tests that need a GPU, then benchmarks/gpu.py; at most 580 seconds
#   bash benchmarks/gpu_check.sh rehearse    here: the same script small on the CPU
#
# OUT names the folder for gpu.json and the log (bench-out), PYTHON the interpreter (python3), TARGET that machine's Python (3.12).
set -uo pipefail
OUT=${OUT:-bench-out} PYTHON=${PYTHON:-python3} WHEELS=.whl
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
mkdir -p "$OUT"

fetch() { # no dependencies: torch, triton, numpy and tokenizers are those of the image
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "${TARGET:-3.12}" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$WHEELS" "$@"
}

case "${1:-}" in
wheels)
    mkdir -p "$WHEELS" && echo '*' >"$WHEELS/.gitignore"
    fetch transformers==5.23.0 compressed-tensors==0.20.0 gguf==0.19.0 loguru pydantic annotated-types typing-inspection httpx || exit 1
    core=$(unzip -p "$WHEELS"/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==//p')
    fetch "pydantic-core==$core" || exit 1
    du -sh "$WHEELS"
    ;;
run)
    if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/lowbit-site "$WHEELS"/*.whl || exit 1
        export PYTHONPATH="/tmp/lowbit-site:$PYTHONPATH"
    fi
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    timeout 80 "$PYTHON" -m pytest -q -p no:cacheprovider -k gpu \
        tests/test_rounding.py tests/test_kernels.py tests/test_columns_gpu.py tests/test_gram.py 2>&1 | tail -15
    tests=${PIPESTATUS[0]}
    timeout -k 5 495 "$PYTHON" benchmarks/gpu.py "$OUT/gpu.json" 2>&1 | tee "$OUT/gpu.log"
    [ "${PIPESTATUS[0]}" = 0 ] && [ "$tests" = 0 ]
    ;;
rehearse) "$PYTHON" benchmarks/gpu.py "$OUT/gpu-rehearsed.json" --rehearse ;;
*) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
