"""A finished or running training as one page: `geomwatch report run.jsonl`, and its parts.

Reads the file of a run and writes a page that works offline. Needs jinja2, which torch brings
along; a static sheet needs matplotlib. Charts are drawn by uPlot, which lies in `vendor` with its
licence.

May import sinks, records and errors; within it `verdict` and `charts` import nothing of the others.
A newcomer would change something here to show another quantity: a row in `charts`.
"""
