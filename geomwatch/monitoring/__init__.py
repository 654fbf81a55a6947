"""What lives as long as a run: the Monitor, when to look, and surviving it.

May import controllers, rules, observation, quantities, estimators, stability, curvature,
isolation, vectors, parallel, records, errors and sinks. A newcomer would change something here to
measure at other times, or to tell somebody else; not to measure or to judge other things.
"""
