#!/usr/bin/env bash
# scRDiT as published (arXiv 2404.06153), by the flags of the ordinary script; one unconditional model per cell type:
#   training/recipes/scrdit-paper.sh CELLS_OF_ONE_TYPE.h5ad OUTPUT_DIR [more arguments of train.py]
#
# X holds log-normalised values, in the paper log2(TPM / 10 + 1); for counts add --target_sum 1e4.
# The deeper of the two published models: --preset scrdit-paper-d3. Sampling as published:
#   training/generate.py --pipeline OUTPUT_DIR --scheduler DDPMScheduler --num_inference_steps 1000 ...
#   training/generate.py --pipeline OUTPUT_DIR --scheduler DDIMScheduler --eta 1 --num_inference_steps 100 (or 50) ...
# Weight decay and betas of AdamW are PyTorch's defaults: the publication gives only the learning rate.
set -euo pipefail
usage="usage: $0 CELLS_OF_ONE_TYPE.h5ad OUTPUT_DIR [arguments of train.py]"
dataset=${1:?$usage}
output_dir=${2:?$usage}
accelerate launch --num_processes 1 "$(dirname "$0")/../train.py" \
    --dataset "$dataset" --output_dir "$output_dir" --preset scrdit-paper-d1 --dropout 0 \
    --value_space log_normalized --decode round --zero_negation True --zero_value -10 --standardize False \
    --flavor cv --n_top_genes 2000 --val_fraction 0 \
    --num_train_timesteps 1000 --beta_schedule linear --prediction_type epsilon \
    --loss_weighting epsilon --max_loss_weight 1e9 \
    --train_batch_size 16 --num_train_epochs 1600 --learning_rate 3e-4 --lr_scheduler constant --lr_warmup_steps 0 \
    --adam_beta2 0.999 --adam_weight_decay 0.01 --max_grad_norm 1e9 --use_ema False "${@:3}"
