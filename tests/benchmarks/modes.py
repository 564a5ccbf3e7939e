"""What kinds of action heads do when the demonstrations know two ways: keep both, or go between them.

    ./vla bench modes [plot:=FILE.png] [out:=FILE]

One observation, and demonstrations that go left as often as right (models/test/fork.py). The tiny policy of each kind
is trained on them and then asked 48 times. `left`, `right`: part of the chunks that end near one of the two ways;
`between`: near the mean of both, where no demonstration has ever been.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "models/test"))
from fork import ASKED, END, KINDS, fork, shares  # noqa: E402


def plot(found: dict[str, np.ndarray], path: Path) -> None:
    """One panel a kind: the chunks it gave, and the two ways of the demonstrations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 * len(found), 3.5), layout="constrained")
    for axes, (label, chunks) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        time = np.linspace(0, 1, chunks.shape[1] + 1)
        answers = axes.plot(time, np.pad(chunks, ((0, 0), (1, 0))).T, color="tab:blue", alpha=0.25, linewidth=1.2)
        jitter = np.random.default_rng(0).uniform(0, 0.06, len(chunks))  # so that equal ends do not hide each other
        axes.plot(1.03 + jitter, chunks[:, -1], ".", color="tab:blue", alpha=0.5, markersize=4)
        for side in (-END, END):
            (way,) = axes.plot(time, side * time, "--", color="black", linewidth=1.4)
        s = shares(chunks)
        axes.set_title(f"{label}\n({KINDS[label].recipe})", fontsize=11)
        axes.set_xlabel(f"left {s['left']:.0%}, right {s['right']:.0%},\nbetween {s['between']:.0%}", fontsize=10)
        axes.set_xlim(0, 1.12)
        axes.set_ylim(-1.35, 1.35)
        axes.set_xticks([0, 1], ["now", "end of\nthe chunk"])
        axes.grid(axis="y", alpha=0.25)
    figure.axes[0].set_ylabel("action (left below 0, right above)")
    labels = ["demonstrated", f"{ASKED} answers"]
    figure.legend([way, answers[0]], labels, loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=None, help="PNG file to draw (default none)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default none)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, report = {}, {"benchmark": "modes", "asked": ASKED, "kinds": {}}
    print(f"{'kind of head':40}{'left':>8}{'right':>8}{'between':>9}")
    for label, kind in KINDS.items():
        found[label] = fork(kind)
        s = report["kinds"][label] = shares(found[label])
        print(f"{f'{label} ({kind.recipe})':40}{s['left']:8.0%}{s['right']:8.0%}{s['between']:9.0%}", flush=True)
    if given.plot:
        plot(found, given.plot)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
