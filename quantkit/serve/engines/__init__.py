"""An artifact behind an OpenAI-compatible API. quantkit starts engines; it is none.

launch        the exact command of vLLM and SGLang, from the artifact and its size: pure
containers    the same as docker and Kubernetes snippets: pure
wording       what the API's requests mean, for the engine below: pure
decoding      one answer after the other with transformers' generate
small_engine  transformers behind the API, for laptops and tests
running       the engine's process, and the gateway before it
"""
