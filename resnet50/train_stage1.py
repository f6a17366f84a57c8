"""Stage 1: train torchvision's ResNet50 on ImageNet, or take its weights.

    python train_stage1.py --Weights torchvision --Data_dir /path/to/imagenet

Reads train/<wnid>/ and val/<wnid>/ in --Data_dir; val is the test set. Writes to results/resnet50/baseline/<rerun>/:
logits_best.pkl (the best epoch on held-out images), logits_final.pkl (the last) and their records. With --Weights
nothing is trained: torchvision's weights, 76.13 % on the test set, or a file's are evaluated and written; a file of v1
weights, such as Keras's, wants STRIDE_IN_1X1 = True in model.py, which nothing in the file can tell. Run again, it goes
on where it was killed; `torchrun --nproc_per_node N train_stage1.py` uses N GPUs.
"""

import sys
from pathlib import Path

from torch.nn import CrossEntropyLoss

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import model
from common import cli, parallel
from common.training import evaluate, make_optimizer, make_schedule, set_dropout, train_epoch


def train(args, images, run):  # from start_run on, what is drawn is drawn from the run's seed
    network = set_dropout(model.build(args.Dims), args.Dropout)
    cli.load_given(args, network, model)  # the weights of --Weights or --Init, if there are any
    network = parallel.place(network, images.device)
    optimizer = make_optimizer(args.Opt, network.parameters(), args.Lr, args.Weight_decay, args.Nesterov)
    steps = images.train.steps(args.Batch_size)
    schedule = make_schedule(optimizer, args.Schedule, args.Epoch, steps, args.Milestones, args.Gamma, args.Warm_up)
    loss = CrossEntropyLoss(label_smoothing=args.Label_smoothing, reduction="sum")
    trained = parallel.wrap(network, compile=args.Compile)  # has the same weights
    for epoch in run.epochs(args.Epoch, network, optimizer, schedule):  # from where a killed run was
        batches = images.train.shuffled(args.Batch_size, run.seed_of(epoch), model.augment())
        metrics = train_epoch(trained, optimizer, schedule, batches, loss, amp=args.Amp)
        run.log(metrics, evaluate(network, images.selection))  # prints a row; keeps the best epoch
    run.finish(network, images.test, last="logits_final.pkl")  # reads the test set


def main():
    args = cli.parse(__file__, __doc__, model, stage=1)
    images = cli.load_data(args)
    for rerun in range(args.Expt_rerun):
        with cli.start_run(args, rerun, "logits_best.pkl", images) as run:
            if not run.finished:
                train(args, images, run)


if __name__ == "__main__":
    cli.run(main)
