#!/usr/bin/env bash
# Install roserag_jax on one worker of a TPU VM, in .venv beside the code; `tpu_vm.sh setup` runs it on all of them.
#
#   launch/setup_tpu_vm.sh
#
# EXTRAS names what is installed besides the core (default tpu,gcs). The images of TPU VMs come with Python 3.10, which is
# too old, so uv fetches one. A second call installs nothing again.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${EXTRAS:-tpu,gcs}
if ! command -v uv >/dev/null; then
  python3 -m pip install --quiet --user uv
  export PATH="$HOME/.local/bin:$PATH"
fi
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable ".[$extras]"
.venv/bin/python -c 'import jax, roserag_jax; print("roserag_jax with jax", jax.__version__)'
