#!/usr/bin/env python3
"""Train all depths of a dynamic-depth model at once by embedded knowledge distillation.

    # One or two minutes on two CPU cores: a small model on scikit-learn's handwritten digits
    accelerate launch train_scripts/train_ekd.py

    # CIFAR-10 from the Hugging Face Hub, the same on every machine that `accelerate launch` knows
    accelerate launch --mixed_precision bf16 train_scripts/train_ekd.py \
        --model ddnn_resnet56 --dataset uoft-cs/cifar10 --epochs 200

    # ImageNet-style folders train/CLASS/*.jpg and val/CLASS/*.jpg, four GPUs, sub-nets of one's own
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_scripts/train_ekd.py \
        --model ddnn_resnet50 --subnets 2,2,2,2 1,2,2,1 --dataset FOLDER --epochs 100 -b 256 --lr 0.4 --warmup-epochs 5

    # Resume from the newest checkpoint of the folder, or begin if there is none: for machines that may stop at any time
    accelerate launch train_scripts/train_ekd.py --output FOLDER --resume auto --checkpoint-interval 500

    # The accuracy of every depth of a trained model
    accelerate launch train_scripts/train_ekd.py --evaluate --pretrained --model output/ddnn_resnet20-digits

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
