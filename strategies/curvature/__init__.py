"""Curvature of a network layer by layer: what natural-gradient methods share."""
