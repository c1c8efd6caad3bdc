"""Pictures of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .figures import OURS, Figure

BAR = 0.8  # of the place that a party has


def bars(path: Path, title: str, figures: Sequence[Figure]) -> None:
    """Draw a group of bars for each thing, a bar a party: the median, and where the middle half of the figures lies."""
    from matplotlib.figure import Figure as Picture

    things = list(dict.fromkeys(one.what for one in figures))
    parties = list(dict.fromkeys(one.party for one in figures))
    picture = Picture(figsize=(1.5 + 0.25 * len(figures) + len(things), 4.5), layout="constrained")
    axes = picture.subplots()
    width = BAR / len(parties)
    for index, party in enumerate(parties):
        own = [one for one in figures if one.party == party]
        spreads = [one.spread for one in own]
        axes.bar(
            [things.index(one.what) + (index - (len(parties) - 1) / 2) * width for one in own],
            [1e3 * spread.median for spread in spreads],
            width,
            yerr=[
                [1e3 * (spread.median - spread.q1) for spread in spreads],
                [1e3 * (spread.q3 - spread.median) for spread in spreads],
            ],
            label=party,
            color="black" if party == OURS else None,
            error_kw={"elinewidth": 1},
        )
    axes.set_xticks(range(len(things)), things)
    axes.set_yscale("log")
    axes.set_ylabel("ms, median and quartiles")
    axes.set_title(title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(path, format="png", dpi=120)
