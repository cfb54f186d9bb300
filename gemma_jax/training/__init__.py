"""Parameters that are trained, and the step that trains them."""
