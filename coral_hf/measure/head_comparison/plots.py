"""The picture of a sweep: τ and draft time by number of groups and share that is read."""

from collections.abc import Mapping
from pathlib import Path

# (number of groups, share of them that is read) → (τ, draft time), of the whole head's
Cells = Mapping[tuple[int, float], tuple[float, float]]

LABEL = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none"}  # readable on any colour


def plot_sweep(cells: Cells, path: Path) -> None:
    """Two heat maps side by side, saved to `path`. matplotlib is imported here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = sorted({number for number, _ in cells})
    shares = sorted({share for _, share in cells})
    figure = Figure(figsize=(9.0, 0.8 * len(shares) + 1.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("τ, of the whole head's", "draft time, of the whole head's")
    for index, axes in enumerate(figure.subplots(1, 2)):
        values = [
            [cells.get((number, share), (float("nan"),) * 2)[index] for number in groups]
            for share in shares
        ]
        axes.imshow(values, cmap="viridis" if index == 0 else "viridis_r", aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:
                    axes.text(column, row, f"{value:.1%}", bbox=LABEL, ha="center", va="center")
        axes.set_xticks(range(len(groups)), [str(number) for number in groups])
        axes.set_yticks(range(len(shares)), [f"1/{1 / share:g}" for share in shares])
        axes.set(title=titles[index], xlabel="groups", ylabel="share that is read")
    figure.savefig(path)
