"""How much memory a rank will take, which strategy that suggests, and what helps where it is too much. No torch."""
