#!/usr/bin/env bash
# What only a GPU can tell, in parts of less than nine minutes and without a network; each leaves JSON in the folder that OUT names.
#   bash benchmarks/gpu.sh check                           operations, precisions and kernels on this GPU against the CPU and float64
#   bash benchmarks/gpu.sh kernels                         Triton's search and loss: times and memory beside other ways and the floor
#   bash benchmarks/gpu.sh peers                           the same beside other libraries', and their peak memory
#   bash benchmarks/gpu.sh speed                           the codebook's part of a step, of every plugin, and over N, K and D
#   bash benchmarks/gpu.sh step                            a whole training step beside SimVQ's structure; NSVQ's beside SimVQ's
#   bash benchmarks/gpu.sh headline [--plugins NAME ...]   vq, simvq, nsvq and simvq_nsvq at 65,536 codes, three seeds; one a part
#   bash benchmarks/gpu.sh large                           up to 1,048,576 codes: images a second and memory
#   bash benchmarks/gpu.sh all
# DATA is a folder of photos with train/ and val/ (.gpu/photos128 if unset); wheels in .gpu/wheels are installed first.
set -euo pipefail
cd "$(dirname "$0")/.."

setup() {
  : "${OUT:?set OUT to the folder for the results}" "${DATA:=.gpu/photos128}"
  mkdir -p "$OUT"
  if (cd /; python -c "import vqzoo, vqzoo_plugins, vqzoo_suites") 2> /dev/null; then return; fi
  if compgen -G ".gpu/wheels/*.whl" > /dev/null; then python -m pip install -q --no-index --no-deps .gpu/wheels/*.whl; fi
  python -m pip install -q --no-index --no-deps --no-build-isolation -e .
}

check() {
  python benchmarks/gpu_check.py "$OUT/check.json"
  python benchmarks/gpu_kernels.py "$OUT/kernels_check.json" --parts check
}

kernels() {
  python benchmarks/gpu_kernels.py "$OUT/kernels_time.json" --parts time
}

peers() {
  for part in search loss memory; do python benchmarks/kernels.py "$part" --device cuda --json "$OUT/peers.jsonl"; done
}

speed() {
  python -m vqzoo bench speed --out "$OUT/speed" data.batch_size=256 codebook.width=128 "$@"
}

step() {
  python benchmarks/step.py structure --gan --json "$OUT/step.jsonl" "$@"
  python benchmarks/step.py nsvq --gan --json "$OUT/step.jsonl" "$@"
}

suite() {
  local name=$1
  shift
  run=$(mktemp -d)
  trap 'keep "$name"' EXIT  # what is finished is kept if time runs out
  python -m vqzoo bench "$name" --data "$DATA" --out "$run" "$@" || echo "some of $name is missing; see its results" >&2
  trap - EXIT
  keep "$name"
}

keep() {
  cp "$run/results.jsonl" "$OUT/$1.jsonl"
  cp "$run/report.html" "$OUT/$1.html"
}

headline() {
  suite headline "$@"
}

large() {
  suite large --jobs 1 "$@"
}

case "${1:-}" in
  check | kernels | peers | speed | step | headline | large)
    setup
    "$@"
    ;;
  all)
    setup
    for part in check kernels peers speed step; do "$part"; done
    for method in vq simvq nsvq simvq_nsvq; do
      headline --plugins "$method"
      for end in jsonl html; do mv "$OUT/headline.$end" "$OUT/headline_$method.$end"; done
    done
    large
    ;;
  *)
    sed -n '2,11p' "$0"
    exit 2
    ;;
esac
