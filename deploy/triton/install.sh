#!/usr/bin/env bash
# Builds .triton/, a real Triton server without a container, and lets it answer once before it is called ready.
#
#   .triton/venv      the Python of the models: numpy, onnxruntime, and the wheel that carries tritonserver
#   .triton/server    -> tritonserver inside that wheel
#   .triton/lib       -> its libraries
#   .triton/backends  python (copied, with the stub of our Python beside it), onnxruntime (-> deploy/triton/backends)
#   .triton/ready     what was built; absent while it is not usable
#
# Running it again does nothing until this file changes. PYTHON=... chooses the interpreter, TRITON_HOME=... the place.
set -euo pipefail

wheel="nvidia-pytriton==0.7.0" # tritonserver 2.51.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
home=${TRITON_HOME:-$root/.triton}

fail() {
    echo "make .triton: $*" >&2
    exit 2
}

check_platform() {
    local elsewhere="Use NVIDIA's container there: docker compose up triton."
    [[ "$(uname -sm)" == "Linux x86_64" ]] || fail "the local Triton needs Linux on x86-64, this is $(uname -sm). $elsewhere"
    local libc
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || true)
    [[ "$libc" == glibc* && "$(printf '2.35\n%s\n' "${libc#glibc }" | sort -V | head -n 1)" == "2.35" ]] ||
        fail "the local Triton needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04), this is ${libc:-another C library}. $elsewhere"
}

# Prints "MINOR DIRECTORY": the directory of libpython when the loader does not know it, for Pythons that Triton has a stub for.
describe_python() {
    "$1" - 2>/dev/null <<'PYTHON'
import ctypes, sys, sysconfig, venv
from pathlib import Path

minor = sys.version_info.minor
if sys.version_info.major != 3 or not 10 <= minor <= 12:
    raise SystemExit(1)
name = f"libpython3.{minor}.so.1.0"
directory = Path(sysconfig.get_config_var("LIBDIR") or "/")
if (directory / name).is_file():
    print(minor, directory)
else:
    ctypes.CDLL(name)
    print(minor, "")
PYTHON
}

choose_python() {
    local candidate description
    for candidate in "${PYTHON:-python3}" python3 python3.12 python3.11 python3.10; do
        if description=$(describe_python "$candidate"); then
            python=$candidate
            read -r minor libpython <<<"$description"
            return
        fi
    done
    fail "no Python 3.10 to 3.12 with its shared library was found; on Debian and Ubuntu: apt install python3-venv libpython3-dev."
}

build() {
    rm -rf "$home/ready" "$home/venv" "$home/backends" "$home/server" "${home:?}/lib"
    "$python" -m venv "$home/venv"
    local pip=("$home/venv/bin/python" -m pip --disable-pip-version-check --quiet install)
    "${pip[@]}" "numpy>=1.26,<2" "onnxruntime>=1.20"
    "${pip[@]}" --no-deps "$wheel" # only the server inside it is used, not the Python package
    local packages="venv/lib/python3.$minor/site-packages"
    ln -s "$packages/pytriton/tritonserver" "$home/server"
    ln -s "$packages/nvidia_pytriton.libs" "$home/lib"
    [[ -z "$libpython" ]] || ln -sf "$libpython/libpython3.$minor.so.1.0" "$home/lib/"
    chmod +x "$home/server/bin/tritonserver"
    mkdir "$home/backends"
    cp -r "$home/server/backends/python" "$home/backends/python"
    install -m 755 "$home/server/python_backend_stubs/3.$minor/triton_python_backend_stub" "$home/backends/python/"
    ln -s "$root/deploy/triton/backends/onnxruntime" "$home/backends/onnxruntime"
}

prove() {
    if ! "$home/venv/bin/python" "$root/deploy/triton/smoke.py" "$home" >"$home/smoke.log" 2>&1; then
        tail -n 20 "$home/smoke.log" >&2
        fail "the server was built but does not answer rightly; its log is $home/smoke.log."
    fi
}

check_platform
mkdir -p "$home"
exec 9<"$home"
flock 9
mark="installer $(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)"
if [[ -f "$home/ready" ]] && grep -qxF "$mark" "$home/ready"; then
    exit 0
fi
choose_python
echo "Building a local Triton in $home (about 350 MB, once) ..."
build
prove
{
    echo "$wheel"
    "$home/venv/bin/python" -m pip --disable-pip-version-check freeze | grep -E '^(numpy|onnxruntime)=='
    "$home/venv/bin/python" --version
    echo "$mark"
} >"$home/ready"
echo "Triton is ready: $(head -n 4 "$home/ready" | paste -sd' ')"
