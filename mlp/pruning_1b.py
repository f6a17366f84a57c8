"""Stage 2: score one pair of layers of the MNIST-MLP.

    python pruning_1b.py --key_id 0

key_id 0 is (fc1, fc2), 1 is (fc2, final). Reads logits_best.pkl from --weights_dir and images of the training split.
Writes beside the checkpoint: I_parent_<postfix>_<parent>_<child>.npy, the conditional mutual information of every group
of the child layer with every group of the parent layer given all other parents; the groups' labels; a record. A run
that was killed goes on where it was. Expect about half a minute on two CPU cores for key_id 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import activations, artifacts, cli, masks, scoring
from common.data import load, sample_per_class
from model import GROUPS, MLP, NAME, PAIRS, RECIPE


def main() -> None:
    args = cli.parse(
        __doc__,
        stage=2,
        model=NAME,
        dataset=RECIPE["Dataset"],
        dims=RECIPE["Dims"],
        weights_dir="mlp/baseline/0",
        samples_per_class=650,
        **GROUPS,
    )
    parent, child = PAIRS[cli.in_range("key_id", args.key_id, PAIRS)]
    options = cli.scoring_options(args)
    device = cli.device(args.device_ids)
    network, weights = MLP(args.dims), args.weights_dir / "logits_best.pkl"
    checkpoint = artifacts.load_weights(network, weights)
    data = load(args.dataset, args.data_dir, val_size=checkpoint.get("val_size", 0), device=device)
    cli.check_data(args, data, checkpoint)
    groups = (cli.one_per_pair(flag, getattr(args, flag), 1)[0] for flag in GROUPS)
    blocks = masks.contiguous_blocks(network, child, *groups, last=child == PAIRS[-1][1])
    files = [artifacts.of_pair(f, parent, child) for f in artifacts.score_families(args.weights_dir, args.name_postfix)]
    record = {"stage": 2, "arguments": cli.recorded(args), "inputs": artifacts.checksums(weights)}
    if artifacts.is_complete(files[0], record):
        return
    rows = sample_per_class(data.train.labels, args.samples_per_class, args.seed)
    parents, children = activations.paired(network.to(device), [child], data.train[rows])[child]
    record |= {"data": data.describe(), **artifacts.circumstances(device)}
    scoring.score(children, parents, blocks, files, record, **options)


if __name__ == "__main__":
    cli.run(main)
