"""What serving costs: owned or rented cards against API prices, every figure with its arithmetic. Pure but for reading.

parse(text, name) -> Assumptions     every assumption, of one YAML file                assumptions.py
figures(assumptions) -> Figures      by key, each with its arithmetic                  figures.py
checked(assumptions, figures)        figures that somebody claimed, redone             claims.py
sensitivity(assumptions)             what a change of each assumption does             sensitivity.py
"""
