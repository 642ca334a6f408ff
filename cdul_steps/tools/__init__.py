"""Commands beside the stages: no rule runs them."""
