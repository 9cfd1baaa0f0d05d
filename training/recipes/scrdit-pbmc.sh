#!/usr/bin/env bash
# Ten bead-sorted blood cell types (SRP073767), all defaults:
#   training/recipes/scrdit-pbmc.sh pbmc_zheng_facs.h5ad [more arguments of train.py]
set -euo pipefail
dataset=${1:?usage: $0 CELLS.h5ad [arguments of train.py]}
accelerate launch "$(dirname "$0")/../train.py" \
    --dataset "$dataset" --labels_key cell_type --output_dir outputs/scrdit-pbmc "${@:2}"
