"""The trainer of tiny-v3, a small trained DeepSeek-V3. See tests/tools/README.md.

The checkpoint of `builtin:tiny-v3` and its card are in quantkit/data/models/tiny_v3.

    templates.json  words and sentences of the corpus
    templates.py    templates.json as typed values
    corpus.py       the seeded generator of training text and held-out items
    held_out.py     `PYTHONPATH=tests python -m tools.tiny_v3.held_out --out DIR`
    packing.py      tokenizer and packed training rows
    model.py        the model; experts.py: routed experts with a hand-written gradient
    muon.py         the optimizer
    export.py       BF16 and FP8 checkpoints with the hub's tensor names
    train.py        `PYTHONPATH=tests python -m tools.tiny_v3.train --minutes 27 --out DIR`
"""
