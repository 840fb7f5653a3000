"""Generator of the text files in calibration/.

    PYTHONPATH=tests python -m tools.calibration_sets --out calibration

    tiny_v3.py  sets for tiny-v3, from its own corpus
    specs.py    the YAML specs

See tests/tools/README.md.
"""
