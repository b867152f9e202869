#!/usr/bin/env bash
# Perplexity, KL divergence and top-1 agreement of VecInfer at 2 and at 4 bits beside mlx_lm's own
# 4-bit cache, on SmolLM2. Run by `make quality`. Environment:
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

methods=vecinfer,mlx4
for bits in 2 4; do
  artifacts=build/quality/$(cksum < "$calibration" | cut -d' ' -f1)-$bits
  if [[ ! -d $artifacts ]]; then
    rm -rf "$artifacts.part"
    .venv/bin/veloxquant calibrate smollm2 --bits $bits --text "$calibration" -o "$artifacts.part"
    mv "$artifacts.part" "$artifacts"
  fi
  .venv/bin/veloxquant eval smollm2 --method $methods --bits $bits --artifacts "$artifacts" \
    --text "$text" --windows "${WINDOWS:-8}" --length 2048
  methods=vecinfer  # once is enough for the cache that does not depend on our bits
done
