"""Settings of the property tests."""

from hypothesis import settings

# The first call of a torch function can take longer than the default deadline of an example.
settings.register_profile("tensors", deadline=None, max_examples=50)
settings.load_profile("tensors")
