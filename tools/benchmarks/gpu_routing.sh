#!/bin/sh
# Pictures of routing: ghost routing with overlaps 1, 2 and 4, partitioned with 1 and 2, of four sites that share a GPU.
#   tools/benchmarks/gpu_routing.sh NAME=GPU... [-- more arguments for fit]
# NAME is ghost_1, ghost_2, ghost_4, partitioned_1 or partitioned_2; runs that name one GPU share it.
#   for example: tools/benchmarks/gpu_routing.sh ghost_1=0 ghost_2=0 ghost_4=1 partitioned_1=1 partitioned_2=1
# The corpus (data/eight_sites/README.md) with 6 MB a domain and 8,192 subwords must be in runs/data/eight_sites_8192:
#   python data/make_eight_sites.py runs/eight_sites --mb-per-site 6
#   fomoe prepare --source runs/eight_sites/*.txt --separator '\x1e' --tokenizer bpe:8192 \
#     --tokenizer_mb 16 --output runs/data/eight_sites_8192
# On a CPU: tools/benchmarks/gpu_routing.sh ghost_2= -- -c configs/experiment/routing_cpu.yaml
# PYTHON names the interpreter, RUNS the folder for runs (runs/routing), LIMIT the most seconds of a run (none), PACK a
# tar.gz that all runs are packed into at the end (none).
set -eu
cd "$(dirname "$0")/../.."
if [ -x .venv/bin/python ]; then default=.venv/bin/python; else default=python3; fi
python=${PYTHON:-$default}
runs=${RUNS:-runs/routing}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$runs"

names=""
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
  names="$names $1"
  shift
done
if [ $# -gt 0 ]; then shift; fi

processes=""
for entry in $names; do
  name=${entry%=*} gpu=${entry#*=}
  port=$((20000 + $(printf %s "$runs/$name" | cksum | cut -d ' ' -f 1) % 10000)) # several runs start at once
  CUDA_VISIBLE_DEVICES=$gpu MASTER_PORT=$port ${LIMIT:+timeout -s KILL "$LIMIT"} \
    "$python" -m fomoe_pl fit -c configs/experiment/routing_eight_domains.yaml \
    --trainer.strategy.init_args.routing "${name%_*}" --trainer.strategy.init_args.overlap "${name#*_}" \
    --trainer.logger.init_args.save_dir "$runs" --trainer.logger.init_args.name "$name" "$@" \
    > "$runs/$name.log" 2>&1 &
  processes="$processes $!"
done
failed=0
for process in $processes; do wait "$process" || failed=1; done
if [ -n "${PACK:-}" ]; then tar -czf "$PACK" -C "$runs" .; fi
exit $failed
