"""The Compare page: one prompt, several adapter stacks, side by side."""
