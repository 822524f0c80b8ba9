"""The child-process machinery: no Qt, no machine-learning library."""
