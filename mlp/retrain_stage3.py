"""Stage 3: prune the MNIST-MLP by the scores of stage 2 and retrain what is left.

    python retrain_stage3.py --Prune_per 0.962

Reads a checkpoint of stage 1 and, unless --Criterion says otherwise, scores of stage 2. Writes to
results/mlp/pruned/<rerun>/: logits_<pruned>.pkl, where <pruned> is the percentage of the masked layers' weights
that are exactly zero, its record, and one line per epoch.
Expect about 98.4 % on the test set with 96.2 % of fc2 pruned; about a minute on two CPU cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import artifacts, cli, masks, runs
from model import GROUPS, MLP, NAME, PAIRS, RECIPE


def main() -> None:
    args = cli.parse(
        __doc__,
        stage=3,
        **RECIPE,
        **GROUPS,
        Model=NAME,
        Retrain="mlp/baseline/0/logits_best.pkl",
        parent_key=["fc1.weight"],
        children_key=["fc2.weight"],
        upper_prune_limit=[0.99],
        lower_prune_per=0.902,
        upper_prune_per=0.982,
        prune_per_step=0.01,
        Save_dir="mlp/pruned",
    )
    share = cli.pruned_share(args)
    caps = cli.one_per_pair("upper_prune_limit", args.upper_prune_limit, len(args.children_key))
    cli.check_save_dir(args)
    device = cli.device(args.Device_ids)
    network = MLP(args.Dims)
    checkpoint = artifacts.load_weights(network, args.Retrain)
    blocks, scores, score_files = cli.blocks_and_scores(args, network, PAIRS)
    data = cli.load_data(args, device)
    cli.check_data(args, data, checkpoint)
    inputs = artifacts.checksums(args.Retrain, *score_files)
    network.to(device)
    for rerun in range(args.Expt_rerun):
        seed = args.Seed + rerun
        network.load_state_dict(checkpoint["state_dict"])
        pruned = masks.choose(args.Criterion, network, blocks, share, caps, scores=scores, seed=seed)
        held = masks.build(pruned, blocks, network)
        masks.apply(network, held)
        percent = masks.percent_zero([network.get_parameter(key) for key in held])
        best = args.Save_dir / str(rerun) / f"logits_{percent:.2f}.pkl"
        record = {"stage": 3, "arguments": cli.recorded(args), "inputs": inputs, "requested_percent": 100 * share}
        if artifacts.is_complete(best, record):
            continue
        record = runs.train(
            network, data, cli.recipe(args), best, seed=seed, select=args.Select, record=record, held=held
        )
        runs.show(record)


if __name__ == "__main__":
    cli.run(main)
