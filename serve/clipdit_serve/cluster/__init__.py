"""The same service on several processors or machines: Ray Serve starts, watches and replaces its parts.

    client -> proxy (Ray's, with merging.py      the metrics of all ingresses on one page
border.py around it) -> Ingress (the application of app.py, N times)
           -> RayEngine -> Model (a queue, a thread and a model on one GPU or some cores, K times) -> and back

sizes.py        how many of everything, and how much each may hold
wire.py         what travels between an ingress and a model
model.py        a replica that holds a model
engine.py       the engine of an ingress: asks the replicas, knows how they are
ingress.py      a replica that answers HTTP
border.py       around Ray's HTTP proxy: a bound on bodies, and no error that is not in our table
application.py  all of this as an application of Ray Serve, from settings
local.py        a Ray cluster of this machine alone, closed to everybody else; or one that runs already
running.py      from the first request to the last one after SIGTERM
"""
