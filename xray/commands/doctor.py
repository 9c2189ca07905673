"""`xray doctor`."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path
from typing import Annotated

import typer

from xray import dist
from xray.commands.common import AsJson, guarded

SIGNS = {"ok": "", "missing": "-", "broken": "BROKEN"}


@guarded
def doctor(
    as_json: AsJson = False,
    out: Annotated[Path, typer.Option(help="Folder for runs")] = Path("runs"),
) -> None:
    """Check this machine: hardware, libraries, and which features each missing one disables.

    Exit code 1 if it cannot train. Under a launcher, one process per host reports.
    """
    from xray.doctor.checks import examine

    if dist.local_rank() != 0:
        return
    found = examine(out)
    broken = [finding.what for finding in found if finding.state == "broken"]
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"host": socket.gethostname(), "ok": not broken, "findings": rows}))
    else:
        from xray.reports.tables import ResultTable

        columns = "what", "found", "", "problem and fix"
        table = ResultTable(f"xray doctor: {socket.gethostname()}", columns, prose=True)
        for finding in found:
            row = finding.what, finding.found, SIGNS[finding.state], finding.lacks
            table.rows.append(row)
        table.print()
        print(f"broken: {', '.join(broken)}" if broken else "nothing that is needed is missing")
    if broken:
        raise SystemExit(1)
