#!/usr/bin/env bash
# vLLM on a GPU, within ten minutes on one H100: items a second of our engine, of vLLM used plainly and of the
# transformers engine, for SmolLM2-135M and for random weights of about 0.4B and 1B (what they say doesn't matter here).
# Each model's JSON goes to the folder given; it fails where one of them isn't there at the end.
#
#     pip install -e '.[vllm]' && bash eval/speed/gpu.sh [RESULTS]
#
# LIMIT=300 allows for other seconds than 600 in all. CPU=1 runs the same without a GPU on the smallest model and few
# users, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:-eval/results/gpu}
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/begun"
mkdir -p "$results"
# The last ten seconds are for killing what doesn't stop when asked to.
share() { echo $(((${LIMIT:-600} - 10 - SECONDS) / $1)); }  # of what is left, for one of so many models
bounded() {
  local seconds=$1 status=0
  shift
  if ((seconds <= 0)); then
    echo "no time left for: $*" >&2
    return
  fi
  timeout -k 10 "$seconds" "$@" || status=$?
  # The JSON is written after each row: what is done in time stays.
  if [[ $status == 124 || $status == 137 ]]; then echo "stopped after $seconds seconds: $*" >&2; else return "$status"; fi
}
measure() {
  local models=$1 out=$2
  shift 2
  bounded "$(share "$models")" "$python" eval/speed/vllm_engine.py --dtype bfloat16 --out "$out" "$@"
  if [[ ! $out -nt $work/begun ]]; then
    echo "gpu.sh: $out was not written" >&2
    missing=1
  fi
}
missing=0
if [[ -n ${CPU:-} ]]; then
  measure 1 "$results/speed-vllm-cpu.json" --users 2 --sample 1 --only rank,labels
  exit "$missing"
fi
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: torch sees no CUDA device")'
measure 3 "$results/speed-vllm-135m.json" --users 512 --sample 64
models=2
for size in 0.4b 1b; do
  bounded "$(share $models)" "$python" eval/speed/random_model.py "$size" "$work/$size"
  measure $models "$results/speed-vllm-$size.json" --users 512 --sample 32 --only rank,labels,generate --model "$work/$size"
  models=1
done
echo "$results"
exit "$missing"
