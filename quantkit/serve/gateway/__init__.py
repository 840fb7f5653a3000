"""An HTTP gateway for inference engines: admission, API keys, deadlines, fail-over, metrics.

It forwards bytes and never tokenizes.

app               the ASGI application
settings          settings of the operator: upstreams and limits
api_keys          hashed API keys
connections       bounds on connections and on the heads of requests
access            names in Host and Origin that a server without keys trusts
host_check        that check before an application
bodies            the bounded read of a body, and the budget of all bodies
json_scan         a strict check of JSON that keeps offsets instead of values
request           a request: validation, rewriting for an upstream
admission_policy  which request runs, waits or is rejected (pure)
admission_queue   the policy for asyncio: waiting, timeouts, cancellation
upstreams         the engine and its fallbacks, and connections to them
relay             forwarding of a request to an upstream and of its response to the client
response          a response: its head is sent once, errors can be reported in every state
event_stream      where a stream of events is, and whether it is complete
errors            errors in the format of OpenAI's API
metrics           Prometheus metrics
"""
