"""No test measures time, hypothesis' own included: on a busy machine its deadline of 200 ms fails what is right."""

try:
    from hypothesis import settings
except ImportError:  # the GPU tests need no hypothesis, and machines with a GPU may have none
    pass
else:
    settings.register_profile("pear", deadline=None)
    settings.load_profile("pear")
