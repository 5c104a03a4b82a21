"""scoresde-export: a trained run as a folder for others, with a card."""

from __future__ import annotations

from omegaconf import DictConfig

from ..checks import whole
from ..config import ConfigError
from ..interop.export import export, push
from ..runs.load import chosen_run
from ._hydra import launch, read, refusing


def main() -> None:
    """Entry point of `scoresde-export`."""
    launch(export_run, "export")


def export_run(cfg: DictConfig) -> None:
    """Writes the files and prints their names."""
    with refusing():
        command = read(cfg)
        options, folder = command.options, command.folder
        if not command.is_due("README.md"):
            return
        budgets = options["budgets"]
        if budgets is not None:
            budgets = [whole(budget, "each of budgets") for budget in budgets]
        if options["push"] is not None and "/" not in str(options["push"]):
            raise ConfigError(f"push is a repository of the Hugging Face hub, owner/name; got {options['push']!r}.")
        run = chosen_run({**options, "device": "cpu", "kernels": None, "input": None}, command.allow)
        files = export(run, folder, options["format"], budgets=budgets, guidance=options["guidance"])
        print("\n".join(f"{folder / name}" for name in files))
        print(f"{folder / 'README.md'} is the card: its licence is to be filled in.")
        if options["push"] is not None:
            print(push(folder, options["push"], bool(options["private"])))


if __name__ == "__main__":
    main()
