"""What is known of the coming step, computed once a step and read by rules and controllers.

May import estimators, stability, isolation, records and errors. A newcomer would change something
here to let rules know one thing more: a field of the observation in `step`.
"""
