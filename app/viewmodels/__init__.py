"""Qt item models and observable state: no widgets."""
