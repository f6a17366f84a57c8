"""The picture of the method: two layers, their groups, the matrix of scores, the mask. Nothing is measured."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCORES = np.array(
    [[0.61, 0.04, 0.38, 0.02], [0.05, 0.57, 0.03, 0.09], [0.02, 0.30, 0.07, 0.52]]
)  # child x parent groups
KEPT = SCORES > 0.2
UNITS = 2  # in a group
COLOURS = ["tab:blue", "tab:orange", "tab:green", "tab:purple"]  # of parent groups
STYLE = {"svg.hashsalt": "method", "svg.fonttype": "none", "font.size": 11}  # the same bytes every time; text is text


def network(axis: plt.Axes, kept: np.ndarray) -> None:
    """Parent units on the left, child units on the right, connected where their groups' block is kept."""
    children, parents = (np.linspace(0.97, 0.03, groups * UNITS) for groups in kept.shape)
    for j, y in enumerate(children):
        for i, x in enumerate(parents):
            if kept[j // UNITS, i // UNITS]:
                axis.plot([0, 1], [x, y], color=COLOURS[i // UNITS], lw=1, alpha=0.6, zorder=1)
    axis.scatter(np.zeros(len(parents)), parents, 130, [COLOURS[i // UNITS] for i in range(len(parents))], zorder=2)
    shades = [str(0.25 + 0.2 * (j // UNITS)) for j in range(len(children))]
    axis.scatter(np.ones(len(children)), children, 130, shades, zorder=2)
    axis.text(0, -0.09, "parent layer:\n4 groups", ha="center", va="top")
    axis.text(1, -0.09, "child layer:\n3 groups", ha="center", va="top")
    axis.set(xlim=(-0.3, 1.3), ylim=(-0.05, 1.05))
    axis.axis("off")


def scores(axis: plt.Axes) -> None:
    """One number for every child group and parent group."""
    axis.imshow(SCORES, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (j, i), value in np.ndenumerate(SCORES):
        axis.text(i, j, f"{value:.2f}", ha="center", va="center", weight="bold" if KEPT[j, i] else "normal")


def mask(axis: plt.Axes) -> None:
    """The weights of the child layer: rows are child units, columns parent units; a block is kept whole or goes."""
    rgb = np.ones((*KEPT.shape, 3))
    for j, i in np.argwhere(KEPT):
        rgb[j, i] = matplotlib.colors.to_rgb(COLOURS[i])
    axis.imshow(rgb.repeat(UNITS, 0).repeat(UNITS, 1), aspect="auto", alpha=0.75)
    for (j, i), kept in np.ndenumerate(KEPT):
        if not kept:
            axis.text(UNITS * i + 0.5, UNITS * j + 0.5, "0", ha="center", va="center", color="gray")


def picture(target: Path) -> None:
    """Write the picture as SVG."""
    titles = (
        "1  train; group the units",
        "2  score every block",
        "3  the lowest blocks go",
        "4  retrain the rest, once",
    )
    with plt.style.context(["default", STYLE]):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.4))
        figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.2, wspace=0.25)
        network(axes[0], np.ones_like(KEPT))
        scores(axes[1])
        mask(axes[2])
        network(axes[3], KEPT)
        words = (
            "I(child group; parent group\n| all other parents)",
            "blocks of the layer's weights:\nkept, or 0 for good",
        )
        for axis, text in zip(axes[1:3], words, strict=True):
            axis.set(xticks=[], yticks=[], ylabel="child groups")
            axis.set_xlabel(f"parent groups\n{text}")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None, "Creator": None}, facecolor="white")
        plt.close(figure)
