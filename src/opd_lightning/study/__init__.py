"""Small studies that need no model: where objectives land, and how noisy their gradients are."""
