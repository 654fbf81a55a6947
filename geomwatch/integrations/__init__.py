"""Adapters that plug a Monitor into training hosts; each imports its host only when asked for.

May import monitoring, quantities, controllers, rules, observation, stability, curvature,
isolation, vectors, parallel, records, errors and sinks. A newcomer would change something here to
support another host: a public file in front of a folder of its own, which uses what the hosts share
in `_host`.
"""
