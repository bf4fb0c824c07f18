"""Many callers by HTTP: one model that is batched, behind an API that other servers' clients already speak.

settings.py   what whoever starts the service decides
app.py        the FastAPI application, from an engine, settings and a decoder that are handed in
errors.py     every error a caller can meet: status, type and code in one table
routes/       what the routes do: translate, images/edits, models, jobs, health and metrics, the page
fields.py     what a caller may say, and the refusal of everything else
uploads.py    bodies: sizes, multipart, which formats the caller takes
service.py    from an upload to an encoded answer: the way that every route takes
jobs.py       translations that are asked for now and fetched later
guards.py     what stands around every route: key, request id, log line, metrics
decoding.py   uploads become pixels in processes that can be killed
engine.py     the seam between the routes and what runs the model, here or on other machines
variants.py   several ways to run one model in one service, each an engine of its own
opening.py    a model as it lies in its folder now
batching.py   the engine of one process: a queue, and a thread that owns the model
reloading.py  a model that is replaced while it serves
pace.py       how long batches take: Retry-After, refusals of what would come too late, and whether a batch hangs
metrics.py    Prometheus metrics
tracing.py    OpenTelemetry traces
logs.py       JSON lines
connections.py  bounds on the heads of requests
server.py     uvicorn, from the first request to the last one after SIGTERM
"""
