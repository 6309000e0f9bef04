"""Speed and memory beside plain training and other libraries: `python -m benchmarks`; see `benchmarks.__main__`.

models ─▶ variants (ours, peers) ─▶ timing: interleaved rounds ─▶ JSON ─▶ tables, figure, check against targets
                                 └▶ memory: fresh processes ───┘
"""
