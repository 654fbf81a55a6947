"""Pictures of landscapes, drawn from results alone.

May import results of `geomwatch.landscape` and, inside functions, matplotlib. A newcomer would
change something here to draw a result in another way; colours and sizes are in `style`.
"""
