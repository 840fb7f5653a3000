"""What inference engines lack at the edge: admission, keys, deadlines, heartbeats, fail-over, metrics. No tokens here.

settings    what an operator may set
admission   who runs, who waits, who is turned away: pure
turns       the same for asyncio: waiting, giving up, cancellation
keys        who may ask: hashed API keys
asked       one request: read within bounds, checked, rewritten for an upstream
faults      errors as OpenAI's API tells them
reply       one answer: begun once, told of its failure in every state
upstreams   the engine and whoever stands in for it
relay       from the one to the other
metrics     Prometheus
app         the ASGI application
"""
