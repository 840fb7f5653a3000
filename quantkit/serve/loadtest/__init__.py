"""How a server bears load: GuideLLM asks, quantkit keeps what it found beside the artifact and compares it.

prompts  what is asked: rows of a data set
tool     GuideLLM's scenario, process and results
engine   what the server itself tells: its model, its prefix cache
tables, charts, page
"""
