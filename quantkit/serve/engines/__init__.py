"""Inference engines for an artifact: launch commands, containers, processes, a transformers server.

target               the model to serve: its size, and the engines that read it
launch               the command of vLLM and SGLang for a placement (pure)
launch_plan          from the options of `quantkit serve` to a command
containers           the command in docker and Kubernetes (pure)
start                verification, and the start of an engine and its gateway
engine_process       the process of an engine
openai_protocol      requests and responses of OpenAI's API (pure)
decoding             sequential generation with transformers
transformers_server  transformers with OpenAI's API, for laptops and tests
"""
