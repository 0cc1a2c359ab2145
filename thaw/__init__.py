"""The command line: the top layer, which puts the other packages together. Start reading at :mod:`thaw.cli`."""
