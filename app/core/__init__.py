"""Plain data and rules: no Qt, no machine-learning library, no process."""
