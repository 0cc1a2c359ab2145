"""``thaw keys make | rotate | show``: the keys that seal and sign checkpoint images.

In: the folder, else that of the settings. Out: files of :mod:`infra.imagekeys`; what is shown is never secret.
"""

from __future__ import annotations

import base64
from pathlib import Path

import click

from infra import imagekeys
from infra.errors import KeysInvalid
from infra.settings import Settings

_FOLDER = click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))


@click.group()
def keys() -> None:
    """Keys of checkpoint images: a folder, which a cluster's Secret can be made of."""


@keys.command()
@_FOLDER
@click.pass_obj
def make(settings: Settings, folder: Path | None) -> None:
    """Make FOLDER with new keys; one that is there is left alone."""
    folder = folder or settings.image_keys
    click.echo(f"{'made' if imagekeys.make(folder) else 'left as it is'}: {folder}")


@keys.command()
@_FOLDER
@click.option("--signing", is_flag=True, help="The key that signs, not the one that encrypts.")
@click.pass_obj
def rotate(settings: Settings, folder: Path | None, signing: bool) -> None:
    """Add a key that new checkpoints use; older ones stay readable until their key's line is removed."""
    folder = folder or settings.image_keys
    imagekeys.load(folder)
    try:
        key_id = imagekeys.add_signing_key(folder) if signing else imagekeys.add_ring_key(folder)
    except OSError as error:
        raise KeysInvalid(f"keys in {folder} cannot be changed: {error}; change the Secret that is mounted there instead") from error
    click.echo(f"{'signs' if signing else 'encrypts'} from now on: {key_id}")


@keys.command()
@_FOLDER
@click.pass_obj
def show(settings: Settings, folder: Path | None) -> None:
    """Say which keys there are, and the public ones."""
    found = imagekeys.load(folder or settings.image_keys)
    for name, ids in (("ring", found.ring), ("signing", found.signing)):
        for key_id in ids:
            click.echo(f"{name:8} {key_id}{'  (for new checkpoints)' if key_id == list(ids)[-1] else ''}")
    for key_id, key in found.trusted.items():
        click.echo(f"trusted  {key_id}  {base64.b64encode(key).decode()}")
