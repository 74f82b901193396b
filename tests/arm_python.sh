#!/usr/bin/env bash
# A Python for AArch64 that runs here, under qemu, with what the tests of the runtime need.
#
#     tests/arm_python.sh FOLDER PYTHON
#
# FOLDER/root gets Debian's packages for arm64, unpacked and not installed; FOLDER/site the wheels;
# FOLDER/python runs it. PYTHON is one of this machine with pip. Which core qemu is, the variable
# QEMU_CPU says.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
pip=("$2" -m pip --disable-pip-version-check --quiet)

command -v qemu-aarch64 > /dev/null || { echo "qemu-aarch64 is missing: apt-get install qemu-user" >&2; exit 1; }
dpkg --print-foreign-architectures | grep -qx arm64 || {
  echo "dpkg does not know arm64 packages: dpkg --add-architecture arm64 && apt-get update" >&2
  exit 1
}
version=$(apt-cache depends python3-minimal | grep -om1 'python3\.[0-9]*')
mkdir -p "$folder/debs" "$folder/root" "$folder/wheels" "$folder/site"
packages=("$version-minimal:arm64" "lib$version-stdlib:arm64" "lib$version-dev:arm64" libstdc++6:arm64)
mapfile -t packages < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
  --no-breaks --no-replaces --no-enhances "${packages[@]}" | grep '^[a-z].*:arm64$' | sort -u)
(cd "$folder/debs" && apt-get download -qq "${packages[@]}")
for package in "$folder"/debs/*.deb; do dpkg-deb -x "$package" "$folder/root"; done

# Wheels that run on any Python and those for arm64 are the same to pip, if it is told the platform.
"${pip[@]}" download --dest "$folder/wheels" --only-binary=:all: --python-version "${version#python}" \
  --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
  numpy safetensors pytest hypothesis
for wheel in "$folder"/wheels/*.whl; do "$2" -m zipfile -e "$wheel" "$folder/site"; done

# A child that a test starts with sys.executable must be emulated as well.
cat > "$folder/site/sitecustomize.py" << EOF
import sys
sys.executable = "$folder/python"
EOF
cat > "$folder/python" << EOF
#!/bin/sh
export PYTHONPATH="$folder/package:$folder/site\${PYTHONPATH:+:\$PYTHONPATH}"
export PATH="/usr/aarch64-linux-gnu/bin:\$PATH"  # nm and objdump of arm64 objects
exec qemu-aarch64 -L "$folder/root" "$folder/root/usr/bin/$version" "\$@"
EOF
chmod +x "$folder/python"
"$folder/python" -c "import platform, numpy; print('Python', platform.python_version(), platform.machine(), 'NumPy', numpy.__version__)"
