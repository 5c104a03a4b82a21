"""`report` for a machine without Hydra or W&B: the same configuration files, command line and result files.

Of Hydra's command line it knows `key=value` and `key.key=value`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from scoresde.runs.logger import provenance

HERE = Path(__file__).parent
HYDRAS = ("defaults", "hydra", "logger")


def launch(task: Callable[[Any], None], name: str) -> None:
    """Reads conf/<name>.yaml and the command line, and runs."""
    config = yaml.safe_load((HERE / "conf" / f"{name}.yaml").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in HYDRAS}
    for argument in sys.argv[1:]:
        path, _, value = argument.partition("=")
        *parents, key = path.split(".")
        if path.split(".")[0] in HYDRAS:
            continue
        place = config
        for parent in parents:
            place = place[parent]
        if key not in place:
            raise SystemExit(f"{path} is no key of conf/{name}.yaml: {', '.join(place)}")
        place[key] = yaml.safe_load(value)
    task(_namespace(config))


def _namespace(config: Any) -> Any:
    return SimpleNamespace(**{k: _namespace(v) for k, v in config.items()}) if isinstance(config, dict) else config


def _plain(config: Any) -> Any:
    return {k: _plain(v) for k, v in vars(config).items()} if isinstance(config, SimpleNamespace) else config


class Report:
    """Rows of one benchmark: results/<name>.jsonl as they come, then <name>.md."""

    def __init__(self, cfg: Any, name: str):
        self.name, self.rows = name, 0
        self.folder = Path(str(cfg.results)) if cfg.results else HERE / "results"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(int(cfg.threads))
        self.facts = provenance()
        self.command = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
        self._file = open(self.folder / f"{name}.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._write({"command": self.command, "config": _plain(cfg), **self.facts})

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def add(self, key: str, value: float, **facts: Any) -> None:
        """One measurement and its columns."""
        self._write({**facts, "value": value})

    def close(self, text: str, figure: Any = None) -> None:
        """Writes the Markdown."""
        body = f"`{self.command}`\n\n{text}\n\n```json\n{json.dumps(self.facts, indent=2)}\n```\n"
        (self.folder / f"{self.name}.md").write_text(body, encoding="utf-8")
        self._file.close()
        print(f"Written to {self.folder}/{self.name}.*")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
