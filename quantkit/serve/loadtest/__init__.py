"""Load tests: GuideLLM sends requests, quantkit stores and compares the results.

prompts    the prompts of a data set
guidellm   GuideLLM's scenario, process and results
engine     data from the server itself: its model, its prefix cache
run        a whole load test
tables, charts, page
"""
