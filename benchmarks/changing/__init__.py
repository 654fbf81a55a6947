"""Runs whose parameters, optimizer or precision change on the way, in each host.

A run is a `Case`: what changes, under which optimizer, how its step is made (clipped, accumulated),
in which host. At each record the exact numbers are computed beside ours, by torch alone. Tests run
some of the cases, and `every_change.py` writes all of them into a table. To add a change, write a
function in changes.py and put it into `CHANGES`.
"""
