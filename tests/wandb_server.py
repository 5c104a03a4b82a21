"""A W&B server of a few lines, sound or broken: `from wandb_server import Server`."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any

FAULTS = ("500", "429", "400", "401", "hang", "nonsense", "refused")


class Server:
    """Answers on a free port of this machine.

    Attributes:
        fault: "" for a sound server, a status, "hang" (the connection stands, nothing comes), "nonsense" (status 200,
            none of the expected fields); it may change while a run is under way. `cut` closes the port.
        url: for WANDB_BASE_URL.
        rows: history rows that were uploaded.
        history: the same as the server keeps them: a run's row takes the place of the one that had its number.
        paths: what was asked for.
    """

    def __init__(self, fault: str = ""):
        self.fault = fault
        self.rows: list[dict[str, Any]] = []
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.paths: list[str] = []
        self._end = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.paths.append(self.path)
                status, answer = server.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._http.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that left
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        if fault == "refused":
            self.cut()

    def cut(self) -> None:
        """Refuses every connection from now on."""
        self._end.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.fault == "hang":
            self._end.wait()
        if self.fault.isdigit():
            return int(self.fault), {"errors": [{"message": "no"}], "error": "no"}
        if self.fault == "nonsense":
            return 200, {"data": {}}
        if not path.startswith("/graphql"):
            files = json.loads(body or b"{}").get("files", {}) if path.endswith("/file_stream") else {}
            history = files.get("wandb-history.jsonl", {})
            rows = [json.loads(line) for line in history.get("content", [])]
            self.rows += rows
            if rows:
                run = path.split("/")[-2]
                self.history.setdefault(run, {}).update(enumerate(rows, history["offset"]))
            return 200, {"exitcode": None, "limits": {}}
        asked = json.loads(body)
        names, given = asked["query"], asked.get("variables") or {}
        entity = {"id": "e", "name": "entity"}
        project = {"id": "p", "name": given.get("project"), "entity": entity}
        if "RunResumeStatus" in names:
            rows = self.history.get(given["name"])
            bucket = None if rows is None else {
                "name": given["name"], "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(rows[max(rows)])]), "eventsTail": "[]", "summaryMetrics": "{}",
                "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return 200, {"data": {"model": {**project, "bucket": bucket}}}
        if "upsertBucket" in names:
            bucket = {
                "id": "b", "name": given["name"], "displayName": given["name"], "description": "", "config": "{}",
                "sweepName": None, "project": project, "historyLineCount": 0,
            }  # fmt: skip
            return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in names:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return 200, {"data": {}}
