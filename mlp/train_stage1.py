"""Stage 1: train the dense MNIST-MLP.

    python train_stage1.py

Reads MNIST from data/ (downloaded if absent). Writes to results/mlp/baseline/<rerun>/: logits_best.pkl (the best
epoch by validation accuracy), logits_final.pkl (the last epoch), their records, and one line per epoch.
Expect about 98.5 % on the test set; about a minute on two CPU cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import artifacts, cli, runs
from model import MLP, NAME, RECIPE


def main() -> None:
    args = cli.parse(
        __doc__,
        stage=1,
        **RECIPE,
        Model=NAME,
        Save_dir="mlp/baseline",
    )
    device = cli.device(args.Device_ids)
    data = cli.load_data(args, device)
    cli.check_data(args, data)
    for rerun in range(args.Expt_rerun):
        best = args.Save_dir / str(rerun) / "logits_best.pkl"
        record = {"stage": 1, "arguments": cli.recorded(args)}
        if artifacts.is_complete(best, record):
            continue
        seed = args.Seed + rerun
        network = runs.seeded(lambda: MLP(args.Dims), seed).to(device)
        print(f"{best.parent}: seed {seed}")
        runs.train(
            network,
            data,
            cli.recipe(args),
            best,
            seed=seed,
            select=args.Select,
            record=record,
            final=best.with_name("logits_final.pkl"),
        )


if __name__ == "__main__":
    cli.run(main)
