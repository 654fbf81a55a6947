"""Situations that runs are found in, each with the right value beside what geomwatch says.

A module holds the situations of a kind: functions that `situation` marks, each of which returns
what geomwatch says, a reference, and whether the two agree. Tests run them one by one, and
`every_situation.py` writes them into a table. To add a kind, add a module and name it in `KINDS`.
"""
