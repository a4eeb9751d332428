"""The benchmark suite: `python -m tests.benchmarks --help`.

data.py makes the files, works.py says what is measured, floors.py what must hold, contenders.py and lazy.py have one
function for each contender, child.py measures one of them in a process of its own, run.py alternates them, report.py
and chart.py show the outcome. To add a contender, write one function in contenders.py.
chunk_costs.py and tensors.py are programs of their own: what a chunk costs, by their number, and what tensors cost.
"""
