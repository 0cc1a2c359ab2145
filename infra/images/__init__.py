"""The container images of Thaw: what is in them, and how it gets there.

``Dockerfile`` makes them where there is a Docker engine, :mod:`.build` where there is none, for the cluster on this machine; both take
what :mod:`.content` puts together, so that tests run what is shipped. :mod:`.runtime` is the base that the second way needs: Python and
its libraries, from this machine.
"""
