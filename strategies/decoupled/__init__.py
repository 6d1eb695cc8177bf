"""Networks cut into modules that learn without waiting for each other's gradients."""
