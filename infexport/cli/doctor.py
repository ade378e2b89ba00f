"""`infexport doctor`."""

from __future__ import annotations

import click

from infexport.cli.output import Output


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do and what is missing.

    Always exits with 0: a machine that cannot do everything is not ill.
    """
    from infexport.doctor import examine

    out = Output(as_json)
    checks = examine()
    width = max(len(check.name) for check in checks)
    for check in checks:
        out.data(f"{'yes' if check.ok else 'no ':3}  {check.name.ljust(width)}  {check.found}")
        if not check.ok:
            out.data(f"     {' ' * width}  to get it: {check.remedy}")
    out.document([check.to_dict() for check in checks])
