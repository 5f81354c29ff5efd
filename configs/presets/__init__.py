"""One small file per recipe, whose ``CONFIG`` is a ``RunConfig``."""
