"""Two pictures of a sweep: every trial's loss over tokens, and the settings against the score.

Knows matplotlib. Does not know how a sweep goes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.schema import SweepConfig
from tune.outcome import Row, best_row

DOTS_PER_INCH = 150


def draw(folder: Path, rows: Sequence[Row], sweep: SweepConfig) -> None:
    """Write `loss.png` and `settings.png`, as far as there are scores to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    scored = [row for row in rows if row.score is not None]
    if scored:
        _draw_losses(folder / "loss.png", scored, sweep)
        _draw_settings(folder / "settings.png", scored, sweep)


def _draw_losses(file: Path, rows: Sequence[Row], sweep: SweepConfig) -> None:
    from matplotlib import pyplot as plt

    best = best_row(rows, sweep)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        style: dict[str, Any] = {"color": "black", "linewidth": 2.2, "zorder": 3} if row is best else {"linewidth": 1, "alpha": 0.7}
        places = [look["num_tokens"] for look in row.looks]
        axes.plot(places, [look[sweep.metric] for look in row.looks], marker=".", label=_label(row, row is best), **style)
    axes.set(xlabel="tokens trained", ylabel=sweep.metric, title=f"{len(rows)} trials")
    axes.legend(fontsize="x-small", ncols=1 + len(rows) // 16)
    figure.savefig(file, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _draw_settings(file: Path, rows: Sequence[Row], sweep: SweepConfig) -> None:
    """Draw one field for each setting; the larger a point, the further its trial came."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, fields = plt.subplots(1, len(sweep.space), figsize=(4 * len(sweep.space), 4), sharey=True, squeeze=False, layout="constrained")
    for axes, (path, dimension) in zip(fields[0], sweep.space.items(), strict=True):
        values = [row.settings[path] for row in rows]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        sizes = [20 + 60 * row.share for row in rows]
        axes.scatter(values if numeric else list(map(str, values)), [row.score for row in rows], s=sizes, alpha=0.7)
        if dimension.log or (numeric and min(values) > 0 and max(values) >= 10 * min(values)):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())  # else they stand on each other
        axes.set_xlabel(path)
    fields[0][0].set_ylabel(f"best {sweep.metric}")
    figure.savefig(file, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _label(row: Row, is_best: bool) -> str:
    settings = ", ".join(
        f"{path.rpartition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{path.rpartition('.')[2]} {value}"
        for path, value in row.settings.items()
    )
    return f"{row.number}: {settings}{' (best)' if is_best else ''}"
