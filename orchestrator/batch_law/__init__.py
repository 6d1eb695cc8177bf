"""The law of the critical batch size, fitted to steps to target: what it is, how well it is known, how far it holds."""
