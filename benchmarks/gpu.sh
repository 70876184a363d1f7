#!/usr/bin/env bash
# Measures everything of benchmarks/gpu.py on one GPU, within BUDGET seconds, and prints the table.
#
#   benchmarks/gpu.sh [OUTPUT.jsonl]          BUDGET=590 PYTHON=.venv/bin/python SMALL= MODELS="gemma2b ..."
#
# Needs the CUDA builds of jax (pip install 'jax[cuda12]') and torch, and the extra 'test' (transformers, peft, trl). SMALL=1
# tries it out on a CPU. Each side runs in a process of its own, so that neither holds the other's memory; what the time
# does not suffice for is left out, our side of every model first.
set -u
output=${1:-runs/gpu.jsonl}
python=${PYTHON:-.venv/bin/python}
end=$((SECONDS + ${BUDGET:-590}))
small=${SMALL:+--small}
mkdir -p "$(dirname "$output")"
: > "$output"
for side in roserag torch; do
  for model in ${MODELS:-gemma2b llama1b qwen1_5b}; do
    left=$((end - SECONDS))
    if [ "$left" -lt 20 ]; then
      echo "no time is left for $side $model" >&2
      continue
    fi
    # shellcheck disable=SC2086
    timeout "$left" "$python" -m benchmarks.gpu --model "$model" --side "$side" --output "$output" $small ||
      echo "$side $model ended with status $?" >&2
  done
done
"$python" -m benchmarks.gpu --table "$output" | tee "${output%.jsonl}.md"
