#!/usr/bin/env bash
# The paper's representation and objective by the same script: log-normalised values with zero negation, the 2,000 genes
# of largest coefficient of variation, patches of 10 genes with a shared projection, epsilon prediction on linear betas.
# Much slower than the defaults: see `make benchmark`.
set -euo pipefail
dataset=${1:?usage: $0 CELLS.h5ad [arguments of train.py]}
accelerate launch "$(dirname "$0")/../train.py" \
    --dataset "$dataset" --output_dir outputs/scrdit-paper-settings --preset scrdit-paper-d1 \
    --value_space log_normalized --target_sum 1e4 --zero_negation True --zero_value -10 --flavor cv --n_top_genes 2000 \
    --prediction_type epsilon --beta_schedule linear --loss_weighting epsilon --max_loss_weight 1e9 \
    --train_batch_size 16 --learning_rate 3e-4 "${@:2}"
