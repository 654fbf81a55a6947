"""Ranks that agree: sums over the processes that train one model, and decisions they share.

May import isolation and errors. A newcomer would change something here to watch a model that is
spread over processes in another way: `ranks` tells who shares a model and what no probe can follow.
"""
