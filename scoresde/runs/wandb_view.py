"""The Weights & Biases view of a run: a process of its own, which `WandbLogger` starts and talks to by files.

Started by its path, so that it imports neither torch nor scoresde. Stdin is a file that grows; each line of it is a
JSON list: a name and arguments. The first is `start`; a training that has gone without `close` was killed. Each line of
stdout is a JSON pair: `folder` and where this run is kept, `url` and where it is shown, or `say` and what the user
should know.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Seconds for W&B's own service on this machine, which needs no network: a machine under load takes some of them. How
# long the end of training waits is `WandbLogger`'s to say.
LOCAL = 90.0

Tell = Callable[[str, str], None]
Messages = Iterator[list[Any]]


def main() -> None:
    # W&B's service would inherit the two files and print to them: it gets /dev/null instead
    inbox, outbox = os.dup(0), os.fdopen(os.dup(1), "w")
    for number, flag in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flag), number)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)  # sent to the whole job, but training says when the run ends
    os.nice(5)  # training goes first where cores are few

    def tell(kind: str, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk
            print(json.dumps([kind, text]), file=outbox, flush=True)

    show(messages(inbox), tell)


def messages(inbox: int) -> Messages:
    """What training has sent; `close` once there is no more and training, whose number is our argument, has gone."""
    cut = b""
    while True:
        going_on = sys.argv[1:] == [str(os.getppid())]  # asked first, for it may write a last row and go
        said = os.read(inbox, 2**20)
        *lines, cut = (cut + said).split(b"\n")
        yield from map(json.loads, lines)
        if not said and not going_on:
            yield ["close", 1]
        if not said:
            time.sleep(0.1)


def show(messages: Messages, tell: Tell) -> None:
    """Passes a run on to W&B, from `start` to `close`; whatever W&B raises ends the view with one line."""
    later, printed = "", io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            run = begin(next(messages)[1], tell)
            later = f"; later: wandb sync {place(run)}"
            follow(run, messages)
    except TimeoutError:
        tell("say", f"W&B did not take everything in time{later}")
    except Exception as error:  # W&B raises anything, from network to pydantic errors
        tell("say", f"W&B stopped ({brief(error)}); the run goes on, metrics.jsonl has every row{later}")
    else:
        if "Fatal error while uploading" in printed.getvalue():  # of which W&B prints a line and raises nothing
            tell("say", f"W&B refused a part of the run{later}")


def begin(options: Mapping[str, Any], tell: Tell) -> Any:
    """A W&B run; an online one that does not begin is kept offline."""
    try:
        return start(options, options["mode"], tell)
    except Exception as error:
        if options["mode"] != "online":
            raise
        leave_service()
        run = start(options, "offline", tell)
        tell("say", f"W&B cannot be reached ({brief(error)}). The run is kept offline; later: wandb sync {place(run)}")
        return run


def start(options: Mapping[str, Any], mode: Any, tell: Tell) -> Any:
    """A W&B run that is online or offline."""
    import wandb

    patience = options["patience"] if mode == "online" else max(LOCAL, options["patience"])
    wanted = {
        # no argv, code, host, packages or git remote in what may be uploaded: secrets end up there
        "console": "off",
        "silent": True,
        "save_code": False,
        "x_disable_meta": True,
        "disable_git": True,
        "x_save_requirements": False,
        "host": "",
        "x_stats_pid": options["pid"],
        "init_timeout": patience,
        "finish_timeout": patience,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1.0,
        "x_sync_dir_suffix": str(os.getpid()),  # W&B names a folder by the second, in which a run may start twice
    }
    run = wandb.init(
        **options["run"],
        mode=mode,
        reinit="finish_previous",
        settings=wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields}),
    )
    # one axis for all: W&B drops rows whose own step goes back, as it does after a restart
    run.define_metric("images")
    run.define_metric("*", step_metric="images")
    tell("folder", place(run))
    if mode == "online":
        tell("url", str(run.url))
    return run


def leave_service(seconds: float = 5.0) -> None:
    """Leaves W&B's service, which still holds a run that did not begin; the next `wandb.init` starts a new one.

    `wandb.teardown` forgets the service first, then waits for its process without a bound, and exits if that failed.
    So it runs beside us: a thread ignores SystemExit, and a service that does not end by itself ends with us.
    """
    import wandb

    teardown = threading.Thread(target=wandb.teardown, daemon=True)
    teardown.start()
    teardown.join(seconds)


def brief(error: Exception) -> str:
    text = str(error)
    if "validation error" in text:  # whose first line does not say which
        text = " ".join(text.split())
    return f"{type(error).__name__}: {text}".partition("\n")[0][:300]


def place(run: Any) -> str:
    """The folder that `wandb sync` takes."""
    return str(Path(run.settings.sync_dir))


def follow(run: Any, messages: Messages) -> None:
    """Every message until `close`."""
    import wandb

    for message in messages:
        match message:
            case "log", row:
                run.log(row)
            case "image", key, path, row:
                run.log({key: wandb.Image(path), **row})
            case "table", key, columns, rows:
                run.log({key: wandb.Table(columns=columns, data=rows)})
            case "summary", values:
                run.summary.update(values)
            case "close", code:
                run.finish(exit_code=code)
                return


if __name__ == "__main__":
    main()
