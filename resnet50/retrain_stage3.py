"""Stage 3: prune ResNet50 by the scores of stage 2 and retrain what is left.

    python retrain_stage3.py --key_id 0 --Data_dir /path/to/imagenet

Prunes all convolutions but the first. Reads a checkpoint and scores of stage 2. Writes results/resnet50/pruned/
<rerun>/logits_<pruned percentage>.pkl and its record. The paper: 71.50 % with 43.01 % of all weights pruned.
"""

import copy
import sys
from pathlib import Path

from torch.nn import CrossEntropyLoss

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import model
from common import artifacts, cli, parallel
from common.activations import block_taylor
from common.masks import Mask, rank, select_blocks
from common.refit import recalibrate_batch_norm, refit
from common.training import evaluate, make_optimizer, make_schedule, set_dropout, train_epoch


def prune(args, network, plan, sample, seed):
    scores = block_taylor(network, plan.blocks, sample) if args.Criterion == "taylor" else plan.scores
    ranks = rank(args.Criterion, network, plan.blocks, scores, seed)
    kept = select_blocks(ranks, plan.blocks, plan.sparsity, plan.max_sparsity, plan.like, args.Even, plan.within)
    return Mask.of_blocks(kept, plan.blocks, network, within=plan.within)


def retrain(args, images, run, dense, mask, sample):
    network = copy.deepcopy(dense)
    mask.apply(network)
    run.remember("test_masked", network)
    run.remember("test_recalibrated", recalibrate_batch_norm(copy.deepcopy(network), sample))
    if args.Refit:
        refit(network, dense, mask, sample)
    run.remember("test_before_retraining", network)
    optimizer = make_optimizer(args.Opt, network.parameters(), args.Lr, args.Weight_decay, args.Nesterov)
    mask.hold(network, optimizer)  # exactly 0 after every step
    steps = images.train.steps(args.Batch_size)
    schedule = make_schedule(optimizer, args.Schedule, args.Epoch, steps, args.Milestones, args.Gamma, args.Warm_up)
    loss = CrossEntropyLoss(label_smoothing=args.Label_smoothing, reduction="sum")
    trained = parallel.wrap(network, compile=args.Compile)  # has the same weights
    for epoch in run.epochs(args.Epoch, network, optimizer, schedule):  # from where a killed run was
        batches = images.train.shuffled(args.Batch_size, run.seed_of(epoch), model.augment())
        metrics = train_epoch(trained, optimizer, schedule, batches, loss, dense, args.Distillation, amp=args.Amp)
        run.log(metrics, evaluate(network, images.selection))  # prints a row; keeps the best epoch
        if epoch == 1:
            run.remember("test_after_1_epoch", network)
    run.finish(network, images.test)  # reads the test set


def main():
    args = cli.parse(__file__, __doc__, model, stage=3)
    dense = set_dropout(model.build(args.Dims), args.Dropout)
    checkpoint = artifacts.load_weights(dense, args.Retrain)
    images = cli.load_data(args, checkpoint)
    dense = parallel.place(dense, images.device)
    plan = cli.pruning_plan(args, dense, model, images, checkpoint)  # blocks, their scores, how much to prune
    sample = cli.calibration_images(args, images)
    for rerun in range(args.Expt_rerun):
        mask = prune(args, dense, plan, sample, args.Seed + rerun)
        with cli.start_run(args, rerun, f"logits_{mask.percent_pruned():.2f}.pkl", images, plan.known, mask) as run:
            if not run.finished:
                retrain(args, images, run, dense, mask, sample)


if __name__ == "__main__":
    cli.run(main)
