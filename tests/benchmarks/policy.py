"""Success of a shipped policy through the whole graph in real time, and whether it reads its instruction.

    ./vla bench policy                            50 unseen seeds, then the same scenes with each object named
    ./vla bench policy robot:=aloha scenes:=0     success only

Scenes of the second part are the same for every named object: a policy that ignores its instruction would do the same
thing in all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vla_bringup.demo import DEFAULTS, DemoConfig, run

#: Objects on the table of the pick task.
OBJECTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", default="panda")
    parser.add_argument("--policy", default="")
    parser.add_argument("--strategy", default="")
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--episodes", type=int, default=50, help="seeds of the success rate")
    parser.add_argument(
        "--scenes", type=int, default=10, help="scenes of the instruction test, each with every object named"
    )
    parser.add_argument("--seed", type=int, default=100_000, help="first seed; training takes seeds below 100000")
    parser.add_argument("--folder", type=Path, default=Path("out/bench_policy"), help="reports and bags")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    policy, task = DEFAULTS.get(given.robot, (given.policy, ""))
    common = dict(
        robot=given.robot, policy=given.policy or policy, task=task, strategy=given.strategy, runtime=given.runtime,
        seed=given.seed, video=False,
    )  # fmt: skip
    success = run(DemoConfig(**common, episodes=given.episodes, out=given.folder / "success"))
    result = {"success": {k: v for k, v in success.items() if k != "results"}}
    if given.scenes:
        rows = []
        for target in range(OBJECTS):
            report = run(
                DemoConfig(
                    **common, episodes=given.scenes, options=(f"target={target}",),
                    out=given.folder / f"target_{target}",
                )
            )  # fmt: skip
            rows += report["results"]
        followed = sum(r["success"] for r in rows)
        wrong = sum(not r["success"] and r["detail"].startswith("lifted") for r in rows)
        by_scene: dict[int, int] = {}
        for r in rows:
            by_scene[r["seed"]] = by_scene.get(r["seed"], 0) + r["success"]
        result["instruction"] = {
            "scenes": given.scenes,
            "episodes": len(rows),
            "named_object_lifted": followed,
            "other_object_lifted": wrong,
            "nothing_lifted": len(rows) - followed - wrong,
            "scenes_in_which_every_object_was_lifted_when_named": sum(n == OBJECTS for n in by_scene.values()),
            "scenes_in_which_two_or_more_were": sum(n >= 2 for n in by_scene.values()),
        }
        print("\nthe same scenes, each object named in turn")
        for name, value in result["instruction"].items():
            print(f"  {name.replace('_', ' '):<52} {value}")
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
