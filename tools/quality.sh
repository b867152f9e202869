#!/usr/bin/env bash
# Perplexity, KL divergence and top-1 agreement on SmolLM2 of VecInfer at 4, 2 and 1 bits, of keys before RoPE,
# of codebooks fitted on the prompt, and of mlx_lm's own 4-bit cache. Run by `make quality`. Environment:
#
#   DATA=folder            with wikitext2-test.txt and wikitext2-valid.txt (default: ../shared/data)
#   TEXT=file              text to score        (default: DATA's test split)
#   CALIBRATION=file       text to calibrate on (default: DATA's validation split; never TEXT)
#   WINDOWS=n              windows of 2048 tokens that are scored (default: 8)
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-../shared/data}
text=${TEXT:-$data/wikitext2-test.txt}
calibration=${CALIBRATION:-$data/wikitext2-valid.txt}
for file in "$text" "$calibration"; do
  if [[ ! -f $file ]]; then
    echo "quality: $file is missing; wanted DATA=folder with WikiText-2 as plain text," \
      "or TEXT=file and CALIBRATION=file" >&2
    exit 2
  fi
done

veloxquant=.venv/bin/veloxquant
kept=build/quality/$(cksum < "$calibration" | cut -d' ' -f1)
artifacts=()
# calibrate NAME OPTIONS...: once, kept under build/quality; for the positions that are scored
calibrate() {
  local directory=$kept/$1
  if [[ ! -d $directory ]]; then
    rm -rf "$directory.part"
    $veloxquant calibrate smollm2 --context 2048 --text "$calibration" -o "$directory.part" "${@:2}"
    mv "$directory.part" "$directory"
  fi
  artifacts+=(--artifacts "$directory")
}
calibrate 4-bits --bits 4
calibrate 2-bits --bits 2
calibrate 2-bits-head-int8 --bits 2 --codebook-per head --entries int8
calibrate 1-bit --bits 1
calibrate 2-bits-rope --method vecinfer_rope --bits 2
calibrate 2-bits-commvq --method commvq --bits 2 --tokens 8192

$veloxquant eval smollm2 --text "$text" --windows "${WINDOWS:-8}" --length 2048 "${artifacts[@]}" \
  --compare fp16,mlx4,mlx4:64/4,vecinfer4:0/0,vecinfer4,vecinfer2,vecinfer1:128/4,vecinfer_rope2,commvq2 \
  --plot "$kept/quality.png"
$veloxquant eval smollm2 --text "$text" --windows "${WINDOWS:-8}" --length 2048 --score-from 1024 \
  --artifacts "$kept/2-bits" --compare adaptive2,vecinfer2
