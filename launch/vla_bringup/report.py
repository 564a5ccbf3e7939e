"""The report of a run: report.json, report.html with plots, the table on the terminal."""

from __future__ import annotations

import base64
import io
import json
import platform
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402
from vla_core.robot import load_robot  # noqa: E402

from vla_bringup.metrics import EpisodeMetrics, episode_metrics, summary  # noqa: E402
from vla_bringup.video import write_video  # noqa: E402

STATES = ("disarmed", "holding", "running", "stopping", "stopped", "fault")


def write_report(config, results: list, status, out: Path) -> dict:
    """Measure the bags of `results` (vla_bringup.episodes.EpisodeResult) and write the report into `out`.

    Args:
        config: vla_bringup.demo.DemoConfig of the run.
        status: vla_msgs/PolicyStatus of the policy that drove.

    Returns:
        What report.json holds.
    """
    robot = load_robot(config.robot)
    measured: list[EpisodeMetrics] = []
    videos: list[str] = []
    for k, result in enumerate(tqdm(results, unit="bag", leave=False)):
        measured.append(episode_metrics(result.bag, robot.rates.control))
        if config.video:
            name = f"episode_{k:03d}.mp4"
            outcome = "success" if result.success else "failure"
            write_video(result.bag, [c.name for c in robot.cameras], result.instruction, outcome, out / name)
            videos.append(name)
    report = {
        "robot": robot.name,
        "policy": status.active,
        "runtime": status.runtime,
        "provider": status.provider,
        "strategy": config.strategy or _strategy(config.policy),
        "task": config.task,
        "seed": config.seed,
        "injected_delay_ms": config.delay * 1e3,
        "episodes": len(results),
        "successes": sum(r.success for r in results),
        "success_rate": sum(r.success for r in results) / len(results),
        "real_time_factor": round(sum(r.duration for r in results) / sum(r.wall for r in results), 3),
        **summary(measured),
        "machine": f"{platform.machine()}, {_processors()} processors, Python {platform.python_version()}",
        "results": [
            {
                "seed": r.seed, "instruction": r.instruction, "options": list(r.options), "success": r.success,
                "detail": r.detail, "duration_s": round(r.duration, 3), "bag": str(r.bag.relative_to(out)),
            }
            for r in results
        ],
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.html").write_text(_html(report, results, measured, videos))
    print(table(report))
    print(f"\nreport: {out / 'report.html'}")
    return report


def table(report: dict) -> str:
    """The run in one table."""

    def spread(values: dict, unit: str) -> str:
        if values["median"] is None:
            return "-"
        return f"median {values['median']:.3g}   p99 {values['p99']:.3g}   max {values['max']:.3g} {unit}"

    rows = [
        ("robot, task", f"{report['robot']}, {report['task']}"),
        ("policy", f"{report['policy']} ({report['runtime']}, {report['provider']}), {report['strategy']}"),
        ("success", f"{report['successes']} of {report['episodes']} ({report['success_rate']:.0%})"),
        ("observation to command age", spread(report["command_age_ms"], "ms")),
        ("inference", spread(report["inference_ms"].get("total", {"median": None}), "ms")),
        ("boundary step", spread(report["boundary_step_mm"], "mm")),
        ("", spread(report["boundary_step_deg"], "deg")),
        ("commanded acceleration", spread(report["acceleration_m_s2"], "m/s2")),
        ("commanded jerk", spread(report["jerk_m_s3"], "m/s3")),
        ("empty ticks", str(report["empty_ticks"])),
        ("control period jitter", spread(report["control_jitter_ms"], "ms")),
        ("real-time factor", f"{report['real_time_factor']:.2f}"),
    ]
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 58)
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])


def _strategy(policy: str) -> str:
    """The strategy that the policy description names."""
    from vla_policy.description import load_parameters

    return load_parameters(policy).get("strategy", "")


def _processors() -> int:
    import os

    return os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------------- plots


def _png(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _motion_plot(m: EpisodeMetrics) -> str:
    arms = list(m.position)
    figure, axes = plt.subplots(4, len(arms), figsize=(6.4 * len(arms), 8), sharex=True, squeeze=False)
    for column, arm in enumerate(arms):
        a, b, c, d = axes[:, column]
        for i, axis in enumerate("xyz"):
            a.plot(m.time, m.position[arm][:, i], label=axis, lw=1.2)
        a.plot(m.time, m.gripper[arm] * 0.1, "k--", lw=0.9, label="gripper / 10")
        a.set_ylabel("commanded tool [m]")
        a.set_title(arm)
        a.legend(fontsize=7, ncol=4, loc="upper right")
        b.plot(m.time[1:], m.speed(arm), lw=1)
        b.set_ylabel("speed [m/s]")
        c.plot(m.time[2:], m.acceleration(arm), lw=0.8)
        c.set_ylabel("acceleration [m/s²]")
        d.plot(m.command_time, m.command_age * 1e3, ".", ms=2, label="command age [ms]")
        d.plot(m.boundary_time, m.boundary_translation * 1e3, "rx", ms=4, label="boundary step [mm]")
        d.legend(fontsize=7)
        d.set_xlabel("time [s]")
        for ax in (a, b, c, d):
            ax.grid(alpha=0.3)
            for t in m.boundary_time:
                ax.axvline(t, color="k", alpha=0.08, lw=0.7)
    return _png(figure)


def _timing_plot(measured: list[EpisodeMetrics]) -> str:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3))
    series = (
        ("observation to command age [ms]", np.concatenate([m.command_age for m in measured]) * 1e3),
        ("inference [ms]", np.concatenate([m.inference.get("total", np.zeros(0)) for m in measured]) * 1e3),
        ("control period jitter [ms]", np.concatenate([m.jitter for m in measured]) * 1e3),
    )
    for axis, (title, values) in zip(axes, series):
        if len(values):
            axis.hist(values, bins=50, range=(0, float(np.percentile(values, 99.5)) or 1.0))
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    return _png(figure)


PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ r.robot }}: {{ r.policy }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1b1f24 }
 h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #d0d7de }
 table { border-collapse: collapse } td, th { padding: .25em .9em; border-bottom: 1px solid #e5e9ee; text-align: left }
 pre { background: #f5f7f9; padding: 1em; overflow-x: auto } img, video { max-width: 100% }
 .success { color: #1a7f37 } .failure { color: #b42318 }
</style></head><body>
<h1>{{ r.robot }} under {{ r.policy }}</h1>
<p>{{ r.successes }} of {{ r.episodes }} episodes succeeded; strategy {{ r.strategy }}, runtime {{ r.runtime }}
({{ r.provider }}){% if r.injected_delay_ms %}, {{ r.injected_delay_ms }} ms injected into every inference{% endif %};
{{ r.machine }}.</p>
<pre>{{ table }}</pre>
<h2>Episodes</h2>
<table><tr><th>seed</th><th>instruction</th><th>outcome</th><th>time</th><th>bag</th></tr>
{% for e in r.results %}<tr><td>{{ e.seed }}</td><td>{{ e.instruction }}</td>
<td class="{{ 'success' if e.success else 'failure' }}">{{ 'success' if e.success else 'failure' }}: {{ e.detail }}</td>
<td>{{ '%.1f' % e.duration_s }} s</td><td><code>{{ e.bag }}</code></td></tr>{% endfor %}</table>
<h2>Timing</h2>
<img alt="Histograms of command age, inference time and control period jitter" src="data:image/png;base64,{{ timing }}">
{% if r.limited_periods %}<p>Control periods in which the safety controller limited the motion:
{% for k, v in r.limited_periods.items() %}{{ k }} {{ v }}{{ ', ' if not loop.last }}{% endfor %}.</p>{% endif %}
{% for e in r.results[:shown] %}
<h2>Episode {{ loop.index0 }}: {{ e.instruction }}</h2>
{% if videos %}<video controls preload="metadata" src="{{ videos[loop.index0] }}"></video>{% endif %}
<p><img alt="Commanded motion of episode {{ loop.index0 }}" src="data:image/png;base64,{{ motion[loop.index0] }}"></p>
{% endfor %}
</body></html>
""",
    autoescape=True,
)
#: Episodes shown with plots in the page.
SHOWN = 10


def _html(report: dict, results: list, measured: list[EpisodeMetrics], videos: list[str]) -> str:
    return PAGE.render(
        r=report, table=table(report), timing=_timing_plot(measured), videos=videos, shown=SHOWN,
        motion=[_motion_plot(m) for m in measured[:SHOWN]],
    )  # fmt: skip
