"""What the benchmarks share: Hydra at the door, rows to JSONL and W&B, a Markdown table with hardware and versions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.main import main as hydra_main
from omegaconf import DictConfig, OmegaConf

from scoresde.config import build
from scoresde.runs.logger import RunFacts, provenance, run_id

HERE = Path(__file__).parent


def launch(task: Callable[[DictConfig], None], name: str) -> None:
    """Composes conf/<name>.yaml with the command line, and runs."""
    hydra_main(version_base="1.3", config_path=str(HERE / "conf"), config_name=name)(task)()


class Report:
    """Rows of one benchmark: results/<name>.jsonl as they come, then <name>.md; W&B sees the same numbers."""

    def __init__(self, cfg: DictConfig, name: str):
        self.name = name
        self.folder = Path(str(cfg.results)) if cfg.results else HERE / "results"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(int(cfg.threads))
        out = Path(HydraConfig.get().runtime.output_dir)
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        self.facts = {**provenance(), "peers": peers.versions(), "processor": _processor()}
        self.command = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
        self.rows: list[dict[str, Any]] = []
        self.logger = build(cfg.logger)
        self.logger.start(RunFacts(out, run_id(config, out), config))
        self._file = open(self.folder / f"{name}.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._write({"command": self.command, "config": config, **self.facts})

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def add(self, key: str, value: float, **facts: Any) -> None:
        """One measurement: `key` names it for W&B, `facts` are its columns."""
        row = {**facts, "value": value}
        self.rows.append(row)
        self._write(row)
        self.logger.log({key: value}, step=len(self.rows), images=len(self.rows))

    def close(self, text: str, figure: Any = None) -> None:
        """Writes the Markdown, and the picture if there is one."""
        facts = json.dumps(self.facts, indent=2)
        body = f"`{self.command}`\n\n{text}\n\n```json\n{facts}\n```\n"
        (self.folder / f"{self.name}.md").write_text(body, encoding="utf-8")
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.logger.table(self.name, columns, [[row.get(name) for name in columns] for row in self.rows])
        if figure is not None:
            path = self.folder / f"{self.name}.png"
            figure.savefig(path, dpi=110)
            self.logger.image(self.name, path, step=len(self.rows), images=len(self.rows))
        self.logger.close()
        self._file.close()
        print(f"Written to {self.folder}/{self.name}.*")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _processor() -> str:
    """Its name, and which instructions for products of bfloat16 it has; with neither, bf16 is slower than fp32."""
    info = Path("/proc/cpuinfo")
    rows = [line.partition(":") for line in (info.read_text().splitlines() if info.exists() else [])]
    facts = {name.strip(): value.strip() for name, _, value in rows}
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', 'unknown')}, {' and '.join(found) or 'neither amx_bf16 nor avx512_bf16'}"
