"""The cost of serving: owned or rented GPUs against API prices, every item with its arithmetic.

parse_assumptions(text, name) -> Assumptions    every assumption, from YAML      assumptions.py
compute_cost_items(assumptions) -> CostItems    by key, with its arithmetic      cost_items.py
recompute_claims(assumptions, items, name)      published figures, recomputed    claims.py
compute_sensitivity(assumptions)                the effect of each assumption    sensitivity.py

tables, charts, page                            results for people and for JSON
"""
