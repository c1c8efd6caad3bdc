"""Draw the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import OURS, Figure, Line

BAR = 0.8  # the part of a group's width that its bars take


def bars(path: Path, title: str, figures: Sequence[Figure]) -> None:
    """Draw a group of bars for each thing, with one bar per party: the median, and the quartiles as error bars."""
    from matplotlib.figure import Figure as Picture

    figures = [one for one in figures if one.seconds]
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


def iterations(
    path: Path, figures: Sequence[Figure], lines: Sequence[Line], paper: Mapping[int, Mapping[int, float]]
) -> None:
    """Draw seconds per iteration over workers, as in the paper: a panel per number of patches, a line per party."""
    from matplotlib.figure import Figure as Picture

    figures = [one for one in figures if one.seconds]
    sizes = list(dict.fromkeys(line.patches for line in lines))
    parties = list(dict.fromkeys(one.party for one in figures))
    picture = Picture(figsize=(1.5 + 4 * len(sizes), 4.5), layout="constrained")
    for axes, patches in zip(picture.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        own = [line for line in lines if line.patches == patches]
        if known := paper.get(patches):
            axes.plot(list(known), list(known.values()), "s:", color="gray", label="the paper, 2010")
        axes.plot([line.workers for line in own], [line.ideal for line in own], "k:", label="ideal")
        for party in parties:
            spreads = [
                (line.workers, one.spread)
                for line in own
                for one in figures
                if (one.what, one.party) == (line.what, party)
            ]
            axes.errorbar(
                [workers for workers, _ in spreads],
                [spread.median for _, spread in spreads],
                [
                    [spread.median - spread.q1 for _, spread in spreads],
                    [spread.q3 - spread.median for _, spread in spreads],
                ],
                fmt="o-" if party == OURS else ".-",
                color="black" if party == OURS else None,
                label=party,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        workers = [line.workers for line in own]
        axes.set_xticks(workers, [str(number) for number in workers])
        axes.set_xlabel("workers")
        axes.set_title(f"{patches:,} patches")
    picture.axes[0].set_ylabel("seconds per iteration")
    picture.axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(path, format="png", dpi=120)


def memory(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw a group of bars for each route and number of workers, with one bar per kind of memory, in MiB."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(2 + 1.5 * len(rows), 4.5), layout="constrained")
    axes = picture.subplots()
    width = BAR / len(names)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, [row[name] / (1 << 20) for row in rows], width, label=name)
    axes.set_xticks(range(len(rows)), [f"{row['route']}, {row['workers']} workers" for row in rows])
    axes.set_ylabel("MiB")
    axes.legend(fontsize="small")
    picture.savefig(path, format="png", dpi=120)
