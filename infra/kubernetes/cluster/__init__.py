"""A real Kubernetes cluster on one machine, for tests and for trying Thaw: ``thaw cluster up``.

Each node lives in a network and a mount namespace of its own, and everything runs below one cgroup. So this machine itself gets one
veth end and nothing else: no bridge, no iptables rule, no mount. :mod:`.layout` says where everything is, :mod:`.configuration` and
:mod:`.certificates` write what the parts read, :mod:`.binaries` builds them, :mod:`.host` and :mod:`.node` make and remove what they
need of the machine, :mod:`.life` does it in order.
"""
