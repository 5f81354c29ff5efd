"""One package per operation: ``api.py`` is what networks call, ``reference.py`` is the plain formula in float32.

Nothing here imports the rest of the project; see ``kernels/linear_attention`` for the shape each package has.
"""
