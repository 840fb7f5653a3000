"""An HTTP gateway for inference engines: admission, API keys, deadlines, fail-over, metrics.

It forwards bytes and never tokenizes.

app               the ASGI application
settings          what an operator can set: upstreams and limits
api_keys          hashed API keys
connections       bounds on connections and on the heads of requests
request           a request: bounded read, validation, rewriting for an upstream
admission_policy  which request runs, waits or is rejected (pure)
admission_queue   the policy for asyncio: waiting, timeouts, cancellation
upstreams         the engine and its fallbacks, one connection pool
relay             forwarding of a request to an upstream and of its response to the client
response          a response: its head is sent once, errors can be reported in every state
errors            errors in the format of OpenAI's API
metrics           Prometheus metrics
"""
