"""tiny-v3: a small, really trained DeepSeek-V3, and the developer tool that made it.

    checkpoint/     the FP8 checkpoint that `builtin:tiny-v3` names
    README.md       its card
    templates.json  the words and sentences that the corpus is made of
    templates.py    templates.json as typed values
    corpus.py       the seeded generator of training text and held-out items
    held_out.py     `python -m tools.tiny_v3.held_out --out DIR`
    packing.py      tokenizer and packed training rows
    model.py        the model (experts.py, attention.py: its two hand-written gradients)
    muon.py         the optimizer
    export.py       BF16 and FP8 checkpoints with the hub's tensor names
    train.py        `python -m tools.tiny_v3.train --minutes 27 --out DIR`

Only checkpoint/ is used by a build; nothing else in quantkit imports this package.
"""
