#!/bin/sh
# Installs torch with the given pip, the build that fits this machine:  tools/install_torch.sh .venv/bin/pip
#   TORCH="torch==2.12.0"    this requirement from the configured index instead of the choice below
#   PIP_ARGS="..."           more arguments for pip, e.g. --index-url
set -eu
pip=$1
pinned="torch==2.13.0"
cpu_index="https://download.pytorch.org/whl/cpu"

# Dependencies follow with the package itself: so only torch is looked up at the CPU index.
# shellcheck disable=SC2086  # PIP_ARGS is a list of words
install() { "$pip" install --no-deps ${PIP_ARGS:-} "$@"; }

if [ -n "${TORCH:-}" ]; then
    install "$TORCH"
elif nvidia-smi -L 2>/dev/null | grep -q GPU; then
    install "torch>=2.11,<2.14"
elif [ "$(uname -s)" != Linux ]; then
    install "$pinned" # the ordinary build is a CPU build there
else
    # 2.13.0+cpu counts as newer than 2.13.0, so pip takes the CPU build (0.2 GB) wherever one is in reach and the
    # ordinary one (several GB with CUDA) where none is. The CPU index may be barred: pip skips it if it does not answer,
    # so a failure here is another one, such as a Python too new for the pinned version or a broken download.
    echo "no NVIDIA GPU found: looking for a CPU build of torch"
    install --timeout 15 --retries 0 --extra-index-url "$cpu_index" "$pinned" ||
        install --extra-index-url "$cpu_index" "torch>=2.11,<2.14"
fi
