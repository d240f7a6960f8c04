"""Settings of the property tests."""

from hypothesis import HealthCheck, Phase, settings

# The first call of a torch function can take longer than the default deadline of an example.
settings.register_profile("tensors", deadline=None, max_examples=50)
# For `mutmut run`: the same examples each time, a mutant is not found out because the machine is busy, and no smaller
# example is searched for once it is.
settings.register_profile(
    "mutants",
    settings.get_profile("tensors"),
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("tensors")
