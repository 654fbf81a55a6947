"""One harness for questions about training runs; forecast.py and rescue.py ask two of them.

A `Run` (run.py; lists of them in grid.py) says what is trained: a task, its optimizer, a rate
relative to the tuned one, and its course. A policy (policies.py) says what stands beside it:
nothing, a monitor, somebody who follows its advice, a controller, or what people use instead.
`execute` trains once; the `Store` keeps what came of it, one file a run; the `pool` does what is
missing. A `Story` is a run as it is read back: judged by its losses alone (outcome.py), its rules
replayed (replay.py), seen by detectors (detectors.py, scoring.py), or compared over seeds and
policies (cells.py). tables/ has the parts of the reports.

A new question is a list of runs, a list of policies and a page.
"""
