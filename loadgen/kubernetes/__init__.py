"""The demo on a Kubernetes cluster: what is deployed (:mod:`.documents`, :mod:`.deploy`), and the run itself (:mod:`.demo`)."""
