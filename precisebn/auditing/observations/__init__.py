"""What checks look at and only a run of the model shows: one observation a file, made by ``subject.observe(Kind)``."""
