"""The embedded stack: CRIU, an Apache Kafka broker and an S3 server, installed and run on this machine.

In: :class:`infra.settings.Settings`. Out: :func:`install_all` for the command line, and the modules of this package.
Next: :mod:`infra.local.stack` starts what was installed.
"""

from __future__ import annotations

from infra.local.install import Report
from infra.settings import Settings

__all__ = ["Report", "install_all"]


def install_all(settings: Settings, report: Report, *, force: bool = False) -> None:
    """Install every tool of the embedded stack that is not there yet, and check those that are.

    Takes about 3 min on two cores from nothing, and half a second when nothing is left to do.

    Args:
        settings: ``paths.cache_dir`` says where the tools go.
        report: gets the progress.
        force: build again what is there.

    Raises:
        InstallError: something could not be fetched or built, or is not what its digest says.
    """
    # Imported here because these modules are part of the package that is being defined.
    from infra.local import broker, criu, objectstore

    criu.ensure(settings, report, force=force)
    broker.ensure(settings, report, force=force)
    objectstore.ensure(settings, report, force=force)
