"""Commands that are not stages: no rule runs them."""
