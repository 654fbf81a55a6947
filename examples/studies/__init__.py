"""The paper's study of three architectures, in parts; `examples/three_architectures.py` runs it.

settings -> data, nets -> cases -> training, measuring, connecting, picturing, artefacts (what is
computed, each piece kept on disk) -> table -> claims, ranking (what is concluded from it) ->
figures, report.
"""
