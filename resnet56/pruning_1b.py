"""Stage 2: score pairs of layers of ResNet56.

    python pruning_1b.py --key_id all

key_id k is PAIRS[k] of model.py: 0 is (conv1, layer1.0.conv1), ..., 54 is (layer3.8.conv2, linear); "all" scores every
pair in one pass over the images. Reads --weights_dir/logits_best.pkl and training images. Writes there
I_parent_<postfix>_<parent>_<child>.npy (conditional mutual information of every child group with every parent group
given all other parents), the groups' labels and a record. Run again, it goes on where it was killed.
"""

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import model
from common import artifacts, cli, parallel
from common.activations import collect_activations, output_sensitivity
from common.data import sample_per_class
from common.masks import correlated_blocks
from common.scoring import uncertainty


def score(args, network, images, pairs):
    sample = images.train[sample_per_class(images.train.labels, args.samples_per_class, args.seed)]
    layers = [pair.child for pair in pairs]
    # what each layer reads and returns, in one pass: means of maps, or --sampling positions
    activations = collect_activations(network, layers, sample, positions=args.positions, seed=args.seed)
    # --given kept: how much of the outputs goes through each child unit is its signal-to-noise ratio
    kept = args.given == "kept"
    sensitivity = output_sensitivity(network, layers, sample, positions=args.positions is not None) if kept else {}
    for pair in pairs:
        parents, children = activations.pop(pair.child)  # (images, units)
        blocks = correlated_blocks(pair.blocks, children, parents) if args.grouping == "correlation" else pair.blocks
        options = cli.scoring_options(args, snr=sensitivity.get(pair.child))
        estimate = pair.estimator(blocks, **options)  # common.cmi.layer_cmi of the blocks' groups
        scores = estimate(children, parents)  # I(C_j; P_i | all other P); goes on where a killed run was
        figures, arrays = uncertainty(estimate, children, parents, scores, args.split_half, args.bootstrap, args.null)
        pair.save(estimate, scores, figures, arrays)


def main():
    args = cli.parse(__file__, __doc__, model, stage=2)
    network = model.build(args.dims)
    checkpoint = artifacts.load_weights(network, cli.weights_path(args))
    images = cli.load_data(args, checkpoint)
    network = parallel.place(network, images.device)
    with cli.pending_pairs(args, network, model, images) as pairs:  # those that are not scored yet
        if pairs:
            score(args, network, images, pairs)


if __name__ == "__main__":
    cli.run(main)
