#!/bin/sh
# Four sites share one GPU: prepare data, train, save, validate the saved model in one process, print the summary.
#   tools/benchmarks/gpu_four_sites.sh [more arguments for fit and validate]
# PYTHON names the interpreter, by default that of .venv where there is one.
# Results: runs/four_sites_one_gpu (report.json, curves, checkpoints/last.ckpt).
set -eu
cd "$(dirname "$0")/../.."
if [ -x .venv/bin/python ]; then default=.venv/bin/python; else default=python3; fi
python=${PYTHON:-$default}
run=runs/four_sites_one_gpu
data=runs/data
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

mkdir -p "$data"
"$python" -m fomoe_pl prepare --source data/sample --output "$data/sample_16384" --tokenizer bpe:16384

step() {
  date "+%H:%M:%S $1"
  subcommand=$1
  shift
  "$python" -m fomoe_pl "$subcommand" -c configs/model/fomoe-153m.yaml -c configs/experiment/four_sites_one_gpu.yaml "$@"
}
step fit "$@"
step validate --ckpt_path "$run/checkpoints/last.ckpt" "$@"
date "+%H:%M:%S end"
"$python" -m fomoe_pl compare "$run"
