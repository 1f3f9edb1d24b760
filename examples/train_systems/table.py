"""Print the tables of the five systems in docs/figures/systems.md from the reports of `aigiqa-reward evaluate`.

    python examples/train_systems/table.py [FOLDER]

FOLDER holds NAME/report.json of each system; by default the reports beside this script, which that page shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from aigiqa_reward.evaluation import OverSeeds, ProtocolReport, published_markdown
from aigiqa_reward.evaluation.protocol import GENERATOR, MODEL
from aigiqa_reward.rewards.build import SYSTEMS
from aigiqa_reward.rewards.factory import get_reward_spec
from aigiqa_reward.training.report import ABLATIONS, RIDGE, SHUFFLED

SPLITS = 10
"""Of the headline; a row of fewer says so."""

MEASURES = {
    "SRCC": "srcc",
    "KRCC": "krcc",
    "PLCC": "plcc",
    "PLCC fitted": "plcc_fitted",
    "SRCC centered": "centered_srcc",
    "gain": "gain",
    "gain within SD 1.5": "gain_within",
    "right prompt, AUC": "right_prompt_auc",
}


def cell(name: str, value: OverSeeds) -> str:
    if value.count == 0:
        return "–"
    spread = f"{value.mean:.3f} ± {value.std:.3f}"
    return f"{spread} ({value.median:.3f})" if name == "SRCC" else spread


def row(label: str, report: ProtocolReport, task: str, predictor: str) -> str | None:
    for summary in report.summary():
        if (summary.task, summary.predictor) == (task, predictor):
            values = (cell(title, getattr(summary, measure)) for title, measure in MEASURES.items())
            fewer = f", {summary.srcc.count} splits" if summary.srcc.count < SPLITS else ""
            return f"| {label}{fewer} | {' | '.join(values)} |"
    return None


def table(reports: dict[str, ProtocolReport], task: str) -> list[str]:
    lines = [f"| {task} | {' | '.join(MEASURES)} |", f"| --- |{' ---: |' * len(MEASURES)}"]
    for name, report in reports.items():
        rows = {MODEL: f"**{get_reward_spec(name).title}**", RIDGE: "ridge on its features"}
        if task == "correspondence":
            rows[SHUFFLED] = "its prompts shuffled"
        lines += [line for key, label in rows.items() if (line := row(label, report, task, key))]
    lines += [line for line in [row(GENERATOR, next(iter(reports.values())), task, GENERATOR)] if line]
    return lines


def ablations(reports: dict[str, ProtocolReport]) -> list[str]:
    lines = ["| ablation | quality SRCC, change | correspondence SRCC, change |", "| --- | ---: | ---: |"]
    for name, report in reports.items():
        run = {score.predictor for score in report.scores}
        for ablation in [ablation for ablation in ABLATIONS[name] if ablation in run]:
            changes = []
            for task in ("quality", "correspondence"):
                change = report.difference(task, ablation, MODEL)
                changes.append(f"{change.mean:+.3f} ± {change.std:.3f}")
            lines.append(f"| {get_reward_spec(name).title}: {ablation} | {' | '.join(changes)} |")
    return lines


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("reports")
    found = {name: folder / name / "report.json" for name in SYSTEMS}
    reports = {name: ProtocolReport.load(path) for name, path in found.items() if path.is_file()}
    if not reports:
        sys.exit(
            f"no NAME/report.json in {folder}; make them with `aigiqa-reward evaluate NAME --report {folder}/NAME`"
        )
    print(f"AGIQA-3K, {next(iter(reports.values())).protocol}. Mean ± deviation over seeds (median).\n")
    for task in ("quality", "correspondence"):
        print("\n".join(table(reports, task)) + "\n")
    print("\n".join(ablations(reports)) + "\n")
    print(published_markdown("AGIQA-3K"))


if __name__ == "__main__":
    main()
