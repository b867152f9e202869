#!/usr/bin/env bash
# Perplexity, KL divergence and top-1 agreement of every method and width. Run by `make quality`.
#
#   DATA=folder   with wikitext2-test.txt and wikitext2-valid.txt (default: ../shared/data)
#   OUT=folder    for the calibrated codebooks (default: build/quality)
#   WINDOWS=n     windows of 2048 tokens that are scored (default: 8)
#
# Without those texts both steps use the built-in text: comparable with each other, not with papers.
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-../shared/data}
out=${OUT:-build/quality}
windows=${WINDOWS:-8}
calibration_text=() evaluation_text=()
if [[ -f $data/wikitext2-test.txt ]]; then
  calibration_text=(--text "$data/wikitext2-valid.txt")
  evaluation_text=(--text "$data/wikitext2-test.txt")
else
  echo "quality: $data/wikitext2-test.txt is missing (DATA=...): using the built-in text" >&2
fi

for bits in 2 4; do
  artifacts=$out/vecinfer-$bits
  [[ -d $artifacts ]] ||
    .venv/bin/veloxquant calibrate smollm2 --bits $bits "${calibration_text[@]}" -o "$artifacts"
  .venv/bin/veloxquant eval smollm2 --method vecinfer --bits $bits --artifacts "$artifacts" \
    --windows "$windows" --length 2048 "${evaluation_text[@]}"
done
