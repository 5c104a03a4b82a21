"""Injects faults into training and prints what it survived: `make reliability`, or a part of it:

    python benchmarks/reliability                     # everything, at full counts: about 40 minutes on two cores
    python benchmarks/reliability resume kills        # two campaigns
    python benchmarks/reliability --short             # the counts of `make test`

At full counts each campaign leaves its results in benchmarks/results/reliability, and benchmarks/RELIABILITY.md is made
of those that are there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import report  # noqa: E402
from result import Result  # noqa: E402

CAMPAIGNS = tuple(sorted(path.stem for path in HERE.glob("*.py") if "\ndef campaign(" in path.read_text()))
KEPT = HERE.parent / "results" / "reliability"


def run(name: str, full: bool) -> list[Result]:
    """One campaign in a folder of its own, its results printed as they are there."""
    campaign = importlib.import_module(name).campaign
    with tempfile.TemporaryDirectory(prefix=f"scoresde-{name}-") as scratch:
        results = campaign(full, Path(scratch))
    for result in results:
        counts = f"{result.survived}/{result.tried} survived, {result.silent} silent"
        print(f"{'ok    ' if result.passed else 'FAILED'} {result.name}: {counts}. {result.note}", flush=True)
    return results


def keep(name: str, results: list[Result], seconds: float) -> None:
    """Leaves the results of one campaign for the page."""
    from scoresde.runs.logger import provenance

    KEPT.mkdir(parents=True, exist_ok=True)
    record = {"seconds": round(seconds), "results": [result._asdict() for result in results], "facts": provenance()}
    (KEPT / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def page() -> str:
    """RELIABILITY.md, of what the campaigns left."""
    rows, seconds, facts = [["test", "tried", "survived", "silent", "95 % bound", "figures"]], 0, {}
    for path in sorted(KEPT.glob("*.json")):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seconds, facts = seconds + record["seconds"], record["facts"]
        for r in (Result(**row) for row in record["results"]):
            bound = f"{100 * r.bound:.2g} %" if r.passed and r.tried >= 30 else ""
            rows.append([r.name, str(r.tried), str(r.survived), str(r.silent), bound, r.note])
    rows[1:] = sorted(rows[1:], key=lambda row: _number(row[0]))
    intro = (HERE / "intro.md").read_text(encoding="utf-8")
    return (
        f"{intro}\n`make reliability`, {seconds / 60:.0f} minutes in all:\n\n{report.table(rows)}\n\n"
        f"```json\n{json.dumps(facts, indent=2)}\n```\n"
    )


def _number(name: str) -> tuple[int, str]:
    """R2 comes before R14."""
    digits = "".join(c for c in name.split()[0] if c.isdigit())
    return (int(digits) if digits else sys.maxsize, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"campaigns: {', '.join(CAMPAIGNS)}; none for all")
    parser.add_argument("--short", action="store_true", help="few cases of each")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CAMPAIGNS):
        parser.error(f"there is no campaign {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
    passed = True
    for name in options.names or CAMPAIGNS:
        began = time.monotonic()
        results = run(name, not options.short)
        seconds = time.monotonic() - began
        print(f"       ({name}: {seconds:.0f} s)", flush=True)
        passed &= all(result.passed for result in results)
        if not options.short:
            keep(name, results, seconds)
            (HERE.parent / "RELIABILITY.md").write_text(page(), encoding="utf-8")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
