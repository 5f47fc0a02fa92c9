#!/usr/bin/env python3
"""Train all depths of a dynamic-depth model at once by embedded knowledge distillation.

    # A small model on scikit-learn's handwritten digits
    python train_scripts/train_ekd.py

    # ImageNet-style folders train/CLASS/*.jpg and val/CLASS/*.jpg, four GPUs, sub-nets of one's own
    accelerate launch --config_file train_scripts/configs/gpus.yaml --num_processes 4 train_scripts/train_ekd.py \
        --model ddnn_resnet50 --subnets 2,2,2,2 1,2,2,1 --dataset FOLDER --epochs 100 -b 256 --lr 0.4 --warmup-epochs 5

    # Resume from the newest checkpoint of the folder, or begin if there is none: for machines that may stop at any time
    python train_scripts/train_ekd.py --output FOLDER --resume auto --checkpoint-interval 500

It is the command `timm-ddnn train` as a script, which `accelerate launch` and `torchrun` take. The recipe is in
`timm_ddnn/train/recipe.py`. The options are named as in timm's training script; random augmentation is a function of
--seed, epoch and image, whatever the number of --workers. On SIGTERM and SIGINT a run saves a checkpoint and ends with
status 75. `accelerate launch` passes signals on to several processes only, so start a single one that may be stopped by
`python train_scripts/train_ekd.py`.
"""
import sys

from timm_ddnn_cli.main import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
