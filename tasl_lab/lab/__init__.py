"Floor 9: `from tasl_lab.lab import Lab` opens it. Imported when it is asked for, so that a single panel does not load the rest."


def __getattr__(name):
    if name != "Lab": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tasl_lab.lab.lab import Lab
    return Lab
