"""``thaw certificate``: a certificate for another machine, of this machine's authority.

In: identities and a folder. Out: the three files that ``tls.ca``, ``tls.certificate`` and ``tls.key`` name there.
"""

from __future__ import annotations

from pathlib import Path

import click

from infra.local import authority
from infra.settings import Settings
from infra.tls import ROLES, identities


@click.command("certificate")
@click.argument("names", nargs=-1, required=True, metavar="thaw://ROLE/NAME...")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for ca.crt, tls.crt and tls.key.")
@click.pass_obj
def command(settings: Settings, names: tuple[str, ...], out: Path) -> None:
    """Make a certificate, signed by the authority in this machine's state folder.

    ROLE is agent (NAME: the node's name), scaler or watcher. Where there is cert-manager, use that.
    """
    for name in names:
        if [identity.role for identity in identities([name])] not in [[role] for role in ROLES]:
            raise click.UsageError(f"{name!r} is not thaw://ROLE/NAME with one of the roles {', '.join(ROLES)}")
    authority.export(settings.paths.state_dir / "tls", out, *names)
    click.echo(f"{out}: ca.crt, tls.crt and tls.key of {', '.join(names)}")
