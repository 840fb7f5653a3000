"""The developer tool that makes the files under calibration/: `python -m tools.calibration_sets --out calibration`.

    tiny_v3.py        sets for tiny-v3, from its own corpus
    general.py        sets for real models: the Python standard library and generated mathematics
    word_problems.py  seeded word problems with a worked solution
    exercises.py      seeded exercises: fractions, algebra, geometry, numbers, chance
    python_text.py    sources and documentation of the running standard library
    specs.py          the YAML specs

Nothing else in quantkit imports this package.
"""
