"""Stage 4: export VGG16, without what a mask leaves idle.

    python export_stage4.py --Checkpoint vgg16/pruned/0/logits_PERCENTAGE.pkl

Reads a checkpoint of stage 1 or 3, or another program's weights, and some training images. Writes to export/ beside it
(or --Save_dir) NAME.safetensors: all weights, zeros as a bit each; NAME.pt2 and NAME.onnx: the network without the
channels that do nothing, with the same outputs, which is checked; and their record. Prints what that saves.
"""

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import model
from common import artifacts, cli, export


def main():
    args = cli.parse(__file__, __doc__, model, stage=4)
    network = model.build(args.Dims).eval()
    artifacts.load_weights(network, args.Checkpoint, foreign=True)
    images = cli.example_images(args)
    with cli.start_export(args) as write:
        if write is None:  # the files are there already
            return
        masked = export.trace(network, images)
        shrunk, cuts = export.shrink(masked, images)  # no channel that nobody reads, or that is the same for all images
        files = export.files(network, shrunk, cli.about(args))  # all three, by suffix
        difference = export.check(files, network, images)  # of outputs; refuses what is more than rounding
        sizes = export.sizes(masked, shrunk, network, files, images)
        latency = export.latencies(masked, shrunk, images, args.Threads, args.Seconds)
        write(files, {**cuts, **sizes, "difference": difference, "latency": latency})


if __name__ == "__main__":
    cli.run(main)
