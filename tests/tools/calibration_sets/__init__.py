"""Generator of the files in calibration/.

    PYTHONPATH=tests python -m tools.calibration_sets --out calibration

    tiny_v3.py        sets for tiny-v3, from its own corpus
    general.py        sets for real models: the Python standard library and generated mathematics
    word_problems.py  seeded word problems with a worked solution
    exercises.py      seeded exercises: fractions, algebra, geometry, numbers, chance
    python_text.py    sources and documentation of the running Python's standard library
    specs.py          the YAML specs

See tests/tools/README.md.
"""
