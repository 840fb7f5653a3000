"""What a model needs and what it runs on: memory, cards, degrees of parallelism, computed bounds. Pure but for reading.

    model_of(target) -> Model      an artifact's headers, a recipe's plan, or a config.json alone      read.py
    needs(model, ...) -> Needs     weights + KV cache of the longest context x users, and a margin     needs.py
    read_cards() -> Cards          the dated, sourced data file of accelerators                        cards.py
    fits(needs, card) -> Fit       how many cards, which parallel degrees, most context and users      fit.py

Memory is counted in bytes and shown in decimal units: 1 GB = 10^9 bytes, 1 GiB = 2^30 bytes = 1.074 GB.
"""
