"""How weights follow their gradients."""
