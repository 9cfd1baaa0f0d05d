#!/usr/bin/env bash
# scRDiT as published (arXiv 2404.06153), one unconditional model per cell type:
#   training/recipes/scrdit-paper.sh CELLS_OF_ONE_TYPE.h5ad OUTPUT_DIR [more arguments of train.py]
#
# X holds log-normalized values, in the paper log2(TPM / 10 + 1); for counts add --target_sum 1e4.
# The deeper of the two published models: --preset scrdit-paper-d3. To sample as published:
#   training/generate.py --pipeline OUTPUT_DIR --scheduler DDPMScheduler --num_inference_steps 1000 ...
#   training/generate.py --pipeline OUTPUT_DIR --scheduler DDIMScheduler --eta 1 --num_inference_steps 100 (or 50) ...
# The recipe is that of the preset: RECIPES in training/arguments.py.
set -euo pipefail
usage="usage: $0 CELLS_OF_ONE_TYPE.h5ad OUTPUT_DIR [arguments of train.py]"
accelerate launch --num_processes 1 "$(dirname "$0")/../train.py" \
    --preset scrdit-paper-d1 --dataset "${1:?$usage}" --output_dir "${2:?$usage}" "${@:3}"
