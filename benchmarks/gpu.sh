#!/usr/bin/env bash
# Everything that needs a GPU, in one command: what there is, the tests, compute-sanitizer, the benchmark.
#
#   bash benchmarks/gpu.sh                      # all four; without a GPU a dry run of them
#   bash benchmarks/gpu.sh check test           # some, where a command has a time limit: check test sanitize bench
#   bash benchmarks/gpu.sh wheels               # before, where there is a network: what a machine without one may lack
#
# Logs and results go to $OUT, else to benchmarks/results/gpu. `wheels` fills .whl with Hydra and its needs for Python
# ${WHEELS_PYTHON:-3.12}; a folder .whl that is there is installed, for this run alone. Without Hydra or W&B the benchmark
# runs as well, and leaves the same files. Needed: torch with CUDA, NumPy, PyYAML, pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/gpu}
export PYTHONUNBUFFERED=1

wheels() {
  local target=(--no-deps --only-binary=:all: --python-version "${WHEELS_PYTHON:-3.12}" --implementation cp -d .whl)
  mkdir -p .whl
  "$python" -m pip download --quiet "${target[@]}" hydra-core==1.3.8 omegaconf==2.3.1 torchsde==0.2.6 trampoline==0.1.2 &&
    "$python" -m pip wheel --quiet --no-deps -w .whl antlr4-python3-runtime==4.9.3 # there is no wheel of it
  ls -l .whl
}

if [[ ${1:-} == wheels ]]; then
  wheels
  exit
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
if compgen -G ".whl/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" .whl/*.whl ||
    echo "the wheels in .whl cannot be installed here; going on without them"
fi
export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"

has() { "$python" -c "import $1" 2> /dev/null; }
gpu=0
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null && gpu=1
((gpu)) || echo "torch sees no GPU: a dry run"

check() {
  if ((gpu)); then SCORESDE_KERNELS=require "$python" -m scoresde.kernels; else "$python" -m scoresde.kernels; fi
}

tests() { "$python" -m pytest -m gpu -rs -p no:cacheprovider tests/kernels/test_kernels_gpu.py; }

# the self-test runs every op in every type, its samples a multiple of nothing
sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "there is no compute-sanitizer here"
    return 0
  fi
  ((gpu)) || return 0
  local tool status=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    # each tensor in an allocation of its own, so that a byte beyond its end belongs to none
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 SCORESDE_KERNELS=require timeout 400 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m scoresde.kernels || status=$?
  done
  return $status
}

bench() {
  local arguments=(results="$out")
  ((gpu)) || arguments+=('sizes=[4096]' rounds=2 repeats=1 steps=5 unet_steps=1 compiled=false)
  if has hydra && ! has wandb; then
    arguments+=(logger._target_=scoresde.train.NullLogger '~logger.mode' '~logger.project')
  fi
  "$python" benchmarks/kernels.py "${arguments[@]}" "hydra.run.dir=$scratch/run"
}

(($#)) || set -- check test sanitize bench
failed=()
for stage in "$@"; do
  if [[ " check test sanitize bench " != *" $stage "* ]]; then
    echo "there is no stage $stage, only: check test sanitize bench"
    exit 2
  fi
  echo "=== $stage"
  run=$stage
  [[ $stage == test ]] && run=tests
  "$run" 2>&1 | tee "$out/$stage.log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed+=("$stage ($status)")
done
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all of $* passed; logs and results are in $out"
